"""Data of one's own and other streams: folders of images, domain-incremental, permuted."""

import json
from statistics import mean

import pytest
import torch
from conftest import CONSTANTS, run
from PIL import Image

import GenerativeReplay
from figures.lab import data, report
from figures.lab.constants import UserError
from figures.lab.runs import with_generator


def make_folder(folder, classes=7, mode="RGB", size=(14, 20), train=12):
    """Make a folder of images in which the class is a bright band, in one of three colours."""
    for part, count in ("train", train), ("test", 4):
        for label in range(classes):
            path = folder / part / f"class {label}"
            path.mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", size, (number, number, number))
                colour = tuple(200 * (channel == label % 3) for channel in range(3))
                image.paste(colour, (0, 2 * label, size[0], 2 * label + 3))
                image.convert(mode).save(path / f"{number}.png")
    return folder


def test_a_folder_in_colour_from_end_to_end(tmp_path):
    make_folder(tmp_path / "shapes")
    words = "--dataset", "shapes", "--n-experiences", 3, "--iterations", 20, "--batch-size", 8
    done = run("GenerativeReplay.py", *words, "--hidden-units", 30, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (file,) = (tmp_path / "results").glob("shapes-*-replay-*/results.json")
    record = json.loads(file.read_text())
    assert record["experiences"][0] == "class 0 class 1 class 2"
    assert record["experiences"][2] == "class 5 class 6" and len(record["classes"]) == 7
    assert torch.tensor(record["confusion_matrix"]).sum(1).tolist() == [4] * 7
    assert (tmp_path / "results" / "figures" / "samples-replay.png").exists()
    (tmp_path / "shapes/train/class 3/1.png").write_bytes(b"other")  # another data set
    broken = run("GenerativeReplay.py", *words, cwd=tmp_path)
    assert broken.returncode == 2 and broken.stderr.count("\n") == 1 and "1.png" in broken.stderr


def test_grey_images_have_one_channel_and_any_size(tmp_path):
    folder = make_folder(tmp_path / "grey", classes=2, mode="L")
    images = data.load_images(CONSTANTS.changed(DATASET=str(folder)))
    assert images.train[0].shape == (24, 1, 20, 14) and images.classes == ["class 0", "class 1"]
    assert images.train[0].dtype == torch.float32 and 0.1 < images.train[0].max() <= 1
    resized = data.load_images(CONSTANTS.changed(DATASET=str(folder), IMAGE_SIZE=9))
    assert resized.test[0].shape == (8, 1, 9, 9) and resized.name != images.name


def test_a_single_class_is_refused(tmp_path):
    make_folder(tmp_path / "images", classes=1)
    done = run("GenerativeReplay.py", "--dataset", "images", cwd=tmp_path)
    assert done.returncode == 2 and "single class, 'class 0'" in done.stderr


def test_validation_takes_no_class_away(monkeypatch):
    y = torch.tensor([0] * 100 + [1] * 3)
    images = data.Images("made up", (torch.rand(103, 1, 2, 2), y), (), ["a", "b"])
    monkeypatch.setattr(data, "load_digits", lambda: images)
    with pytest.raises(UserError, match="VALIDATION_SIZE is 5: a class would have no image"):
        data.load_images(CONSTANTS.changed(VALIDATION_SIZE=5))
    *_, (_, held_out) = data.load_images(CONSTANTS.changed(VALIDATION_SIZE=40))[:3]
    assert held_out.bincount().tolist() == [39, 1]


def test_the_stream_brings_the_classes_in_order_and_any_number_of_experiences():
    images = data.load_digits()
    order = (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)
    constants = CONSTANTS.changed(CLASS_ORDER=order, N_EXPERIENCES=3)
    benchmark = data.make_benchmark(images, constants)
    for stream in benchmark.train_stream, benchmark.test_stream:
        groups = [set(experience.dataset.tensors[1].tolist()) for experience in stream]
        assert groups == [{3, 1, 4, 0}, {5, 9, 2}, {6, 8, 7}]
    assert data.stream_names(images, constants)["experiences"] == ["3 1 4 0", "5 9 2", "6 8 7"]


def test_each_seed_has_its_own_order_of_the_classes_if_they_are_shuffled():
    def order(seed, **changes):
        torch.manual_seed(seed)
        given = CONSTANTS.changed(CLASS_ORDER=(3, 1, 4, 0, 5, 9, 2, 6, 8, 7), **changes)
        return data.shuffle_classes(given).CLASS_ORDER

    orders = [order(seed, SHUFFLE_CLASSES=True) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1] and sorted(orders[1]) == list(range(10))
    assert order(0) == order(1) == (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)


def test_domain_incremental_labels_are_places_in_the_experience():
    images = data.load_digits()
    constants = CONSTANTS.changed(SCENARIO="domain", CLASS_ORDER=(1, 0, 2, 3, 4, 5, 7, 6, 8, 9))
    benchmark = data.make_benchmark(images, constants)
    (x, y, _), (whole, labels) = benchmark.test_stream[0].dataset.tensors, images.test
    assert torch.equal(x[y == 0], whole[labels == 1]) and torch.equal(x[y == 1], whole[labels == 0])
    assert data.shape_and_classes(benchmark) == ((1, 28, 28), 2)


def test_permuted_experiences_are_the_same_images_in_another_order_of_pixels():
    images = data.load_digits()
    torch.manual_seed(0)
    constants = CONSTANTS.changed(SCENARIO="permuted", N_EXPERIENCES=3)
    benchmark = data.make_benchmark(images, constants)
    parts = [experience.dataset.tensors for experience in benchmark.train_stream]
    assert torch.equal(parts[0][0], images.train[0])
    for x, y, _ in parts[1:]:
        assert torch.equal(y, images.train[1]) and not torch.equal(x, parts[0][0])
        assert torch.equal(x.flatten(1).sort(1).values, parts[0][0].flatten(1).sort(1).values)
    test = benchmark.test_stream[1].dataset.tensors[0]
    place = (parts[1][0] == parts[0][0][:, :1, 14:15, 14:15]).flatten(1).all(0).nonzero()[0]
    assert torch.equal(test.flatten(1)[:, place[0]], images.test[0][:, 0, 14, 14])


def test_only_images_with_a_margin_are_shifted():
    digits = data.load_digits()
    framed = [(torch.nn.functional.pad(1 - x, (2,) * 4, value=1), y) for x, y in digits[1:3]]
    framed = digits._replace(train=framed[0], test=framed[1])
    for images, scenario, shifted in [
        (digits, "class", False), (framed, "class", True), (framed, "permuted", False)
    ]:  # fmt: skip
        constants = CONSTANTS.changed(SCENARIO=scenario)
        benchmark = data.make_benchmark(images, constants)
        solver = GenerativeReplay.make_solver(benchmark, constants)
        x = images.train[0][:1]
        moved = any(not torch.equal(solver[:2](x), solver[:1](x)) for _ in range(20))
        assert moved == shifted, scenario


def test_a_new_scholar_knows_nothing_of_later_experiences():
    def scholar(later):
        (first, y), *_ = data.load_digits()[1:3]
        experiences = [(first[y < 2], y[y < 2]), (later(first[y > 1]), y[y > 1])]
        torch.manual_seed(0)
        benchmark = data.in_memory_benchmark(experiences, experiences)
        constants = CONSTANTS.changed(N_EXPERIENCES=2)
        return GenerativeReplay.make_scholar(benchmark, constants)

    as_it_is, inverted = scholar(lambda x: x), scholar(lambda x: 1 - x)
    for one, other in zip(with_generator(as_it_is), with_generator(inverted)):
        assert str(one.model) == str(other.model)  # shift, mean and standard deviation
        assert all(map(torch.equal, one.model.parameters(), other.model.parameters()))


def test_the_first_permutation_does_not_fade(tmp_path):
    strategies = "--strategies", "replay", "naive"
    words = "--dataset", "digits", "--scenario", "permuted", "--n-experiences", 3, *strategies
    done = run("GenerativeReplay.py", *words, "--iterations", 150, cwd=tmp_path, figures=False)
    assert done.returncode == 0, done.stderr
    first = {}
    for file in (tmp_path / "results").glob("*/results.json"):
        record = json.loads(file.read_text())
        first[record["name"]] = record["accuracy_matrix"][-1][0]
    assert first["replay"] > 0.8 and first["naive"] < 0.7, first


def test_black_on_white_is_learned_like_white_on_black():
    digits, constants = data.load_digits(), CONSTANTS.changed(N_EXPERIENCES=2, ITERATIONS=150)
    accuracies = []
    for invert in (lambda x: x), (lambda x: 1 - x):
        train, test = ((invert(x), y) for x, y in (digits.train, digits.test))
        torch.manual_seed(0)
        images = digits._replace(train=train, test=test)
        benchmark = data.make_benchmark(images, constants)
        scholar = GenerativeReplay.make_scholar(benchmark, constants)
        for experience in benchmark.train_stream:
            scholar.train(experience)
        scholar.eval(benchmark.train_stream)  # whose metrics Avalanche goes on to return
        metrics = report.by_experience(scholar.eval(benchmark.test_stream), "Top1_Acc_Exp")
        accuracies.append(mean(metrics))
        assert len(metrics) == 2
    assert min(accuracies) > 0.85 and abs(accuracies[0] - accuracies[1]) < 0.05, accuracies
