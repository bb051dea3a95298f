"""The schematic pictures of the README, drawn with matplotlib.

`python -m figures.schematics` writes scheme_*.svg beside itself.
One visual language, in Okabe and Ito's colours: the solver is blue and the generator vermilion,
images of now are green and those of the past purple, random draws are orange, and what is dashed
is a frozen copy. Lengths are pixels of a README column, 830 wide; y points down.
"""

from pathlib import Path
from types import SimpleNamespace

import matplotlib
from matplotlib import patches
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.path import Path as Line

WIDTH = 830
INK, GREY, PAPER = "#1f2328", "#6e7781", "#f6f8fa"
SOLVER, GENERATOR, CURRENT, REPLAYED = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
RANDOM = "#e69f00"
NETWORKS = dict.fromkeys(["solver", "model"], SOLVER)
NETWORKS |= dict.fromkeys(["generator", "encoder", "z_mean", "z_log_var", "decoder"], GENERATOR)


def pale(colour: str) -> tuple[float, ...]:
    """Mix a colour with white, for areas under text; that of the past with less of it."""
    share = 0.45 if colour == REPLAYED else 0.2
    return tuple(share * part + 1 - share for part in to_rgb(colour))


class Picture:
    """Draw shapes around (x, y) on a light card, readable on light and dark pages."""

    def __init__(self, height):
        self.figure = Figure(figsize=(WIDTH / 96, height / 96))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")
        self.frame(WIDTH / 2, height / 2, WIDTH - 2, height - 2, PAPER, "#d0d7de")

    def frame(self, x, y, width, height, fill="white", edge=GREY, line=1.0, dashed=False):
        """A rectangle with round corners."""
        r = 9
        self.axes.add_patch(patches.FancyBboxPatch(
            (x - width / 2 + r, y - height / 2 + r), width - 2 * r, height - 2 * r,
            f"round,pad={r}", fc=fill, ec=edge, lw=line, ls=(0, (4, 2.5)) if dashed else "-",
        ))  # fmt: skip
        return SimpleNamespace(x=x, y=y, width=width, height=height)

    def words(self, x, y, text, align="center", weight="normal", size=12, family="sans-serif"):
        """Lines of text; with another alignment beside (x, y)."""
        lines = text.split("\n")
        for number, line in enumerate(lines):
            baseline = y + size * (0.36 + 1.4 * (number - (len(lines) - 1) / 2))
            self.axes.text(x, baseline, line, ha=align, fontsize=0.75 * size, color=INK,
                           family=family, weight=weight)  # fmt: skip

    def names(self, *labels):
        """Names of the code, in a typewriter font: (x, y, text) each, alignment, weight."""
        for label in labels:
            self.words(*label, family="monospace")

    def box(self, x, y, text, width=0, height=34, colour=""):
        """A network, an operation or a variable, under its name in the code."""
        self.names((x, y, text))
        width = width or 18 + 7.25 * max(map(len, text.split("\n")))
        colour = colour or NETWORKS.get(text.removeprefix("old_"), GREY)
        frozen = text.startswith("old_")
        return self.frame(x, y, width, height, pale(colour), colour, 1.4, frozen)

    def dot(self, x, y, text, colour=GREY):
        """An operation of one sign, or a random variable."""
        self.axes.add_patch(patches.Circle((x, y), 14, fc=pale(colour), ec=colour, lw=1.4))
        self.words(x, y, text, size=14)
        return SimpleNamespace(x=x, y=y, width=28, height=28)

    def sheets(self, x, y, text, colour, height=36, width=44):
        """A minibatch: images, or what belongs to them."""
        for shift in 5, 0, -5:
            corner = x - width / 2 + shift, y - height / 2 - shift
            sheet = patches.Rectangle(corner, width, height, fc=pale(colour), ec=colour, lw=1.2)
            self.axes.add_patch(sheet)
        self.words(x - 5, y + 5, text)
        return SimpleNamespace(x=x, y=y, width=width + 10, height=height + 10)

    def arrow(self, *points, colour=GREY, line=1.5):
        """An arrow along the points."""
        self.axes.add_patch(patches.FancyArrowPatch(
            path=Line(points), arrowstyle="-|>", mutation_scale=8 + 2 * line, color=colour,
            lw=line, joinstyle="round", capstyle="butt",
        ))  # fmt: skip

    def link(self, route, *shapes, colour=GREY):
        """Arrows from shape to shape: horizontal (h), vertical (v), or with a corner (hv, vh)."""
        for a, b in zip(shapes, shapes[1:]):
            x, y = (b.x, a.y) if route == "hv" else (a.x, b.y)  # of the corner
            if len(route) == 1:  # straight, through the middle of the smaller one
                x, y = (a if a.width < b.width else b).x, (a if a.height < b.height else b).y
            right, down = (0.5 if b.x > a.x else -0.5), (0.5 if b.y > a.y else -0.5)
            start = (a.x + right * a.width, y) if route[0] == "h" else (x, a.y + down * a.height)
            end = (b.x - right * b.width, y) if route[-1] == "h" else (x, b.y - down * b.height)
            self.arrow(start, *[(x, y)] * (len(route) - 1), end, colour=colour)


def scholar() -> Picture:
    """Draw the scholar, from experience to experience."""
    p, past = Picture(382), None
    columns = [(95, "0 1", "0 1"), (350, "2 3", "0 1 2 3"), (605, "4 5", "0 … 5")]
    for k, (x, now, so_far) in enumerate(columns, 1):
        p.words(x, 24, f"experience {k}", weight="bold")
        data, frame = p.sheets(x, 62, now, CURRENT), p.frame(x, 184, 140, 130)
        p.words(x, 135, f"scholar {k}", weight="bold")
        p.box(x, 169, "generator", 112)
        p.box(x, 217, "solver", 112)
        p.link("v", data, frame, colour=CURRENT)
        p.arrow((x + 70, 184), (x + 185, 184))
        p.words(x + 126, 171, "goes on learning")
        if past:
            p.arrow((past.x + 32, 324), (x - 52, 324), (x - 52, 249), colour=REPLAYED)
        copies = p.frame(x + 30, 324, 130, 82)
        p.box(copies.x, 305, "old_generator", 112, 30)
        p.box(copies.x, 343, "old_model", 112, 30)
        p.link("v", frame, copies)
        p.words(copies.x + 10, 266, "frozen copies", "left")
        past = p.sheets(x + 144, 324, so_far, REPLAYED, width=54)
        p.link("h", copies, past, colour=REPLAYED)
        p.words(past.x - 5, 360, "replay")
    p.arrow((past.x + 32, 324), (814, 324), colour=REPLAYED)
    p.words(806, 184, "⋯", size=16)
    return p


def vae() -> Picture:
    """Draw the layers of the VAE, and the density from which z is sampled to generate."""
    p, y = Picture(378), 148
    layers = [(99, y, 200, 784), (157, y, 134, 400), (215, y, 134, 400), (294, y - 46, 40, 32),
              (294, y + 46, 40, 32), (504, y, 40, 32), (574, y, 134, 400), (632, y, 134, 400),
              (690, y, 200, 784)]  # fmt: skip
    for start, end in (0, 1), (1, 2), (2, 3), (2, 4), (5, 6), (6, 7), (7, 8):
        (x0, y0, h0, _), (x1, y1, h1, _) = layers[start], layers[end]
        corners = [(x0, y0 - h0 / 2), (x1, y1 - h1 / 2), (x1, y1 + h1 / 2), (x0, y0 + h0 / 2)]
        p.axes.add_patch(patches.Polygon(corners, color=pale(GENERATOR), alpha=0.6, lw=0))
    bars = []
    for x, at, height, units in layers:
        bars.append(p.frame(x, at, 30, height, pale(GENERATOR), GENERATOR, 1.4))
        p.words(x, at, str(units))
        p.words(x, at - 79, "ReLU" if units == 400 else "")
    image, noise = p.sheets(792, y, "image", REPLAYED, width=46), p.dot(402, 32, "ε", RANDOM)
    sample = p.box(402, y, "reparametrize\n\n\n", 140, 132)
    mixtures = p.box(504, 290, "ClassConditionalGMM\n≤ 100 Gaussians a class", 0, 48, REPLAYED)
    p.words(402, y + 18, "z_mean + σ · ε\nσ = exp(½ z_log_var)")
    p.words(424, 32, "from N(0, I)", "left")
    p.names(
        (294, 69, "z_log_var"), (256, 229, "z_mean"), (504, 114, "z"), (690, 36, "logits"),
        (157, 268, "encoder"), (632, 268, "decoder"), (735, 135, "sigmoid"), (352, 278, "fit"),
        (528, 224, "sample"), (221, 352, "HIDDEN_UNITS = 400"), (394, 352, "LATENT_SIZE = 32"),
        (589, 352, "MIXTURE_COMPONENTS = 100"),
    )  # fmt: skip
    p.link("h", p.sheets(36, y, "x", CURRENT), bars[0])
    p.link("h", bars[3], sample, bars[5])
    p.link("h", bars[4], sample)
    p.link("v", noise, sample)
    p.link("vh", bars[4], mixtures)
    p.link("v", mixtures, bars[5], colour=REPLAYED)
    p.link("h", bars[8], image, colour=REPLAYED)
    return p


def graph() -> Picture:
    """Draw the computational graph of one pass, from the images to the loss."""
    p = Picture(396)
    p.frame(376, 198, 608, 204)
    p.frame(356, 204, 146, 172, PAPER)
    encoded = p.frame(222, 182, 106, 106, PAPER)
    p.names((18, 26, "negative_elbo", "left", "bold"), (82, 114, "VAE.forward", "left", "bold"),
            (356, 133, "reparametrize"))  # fmt: skip
    p.words(385, 266, "from N(0, I)", "right")
    p.words(785, 219, "mean over\nimages")
    x, encoder = p.sheets(38, 182, "x", CURRENT), p.box(120, 182, "encoder")
    z_mean, z_log_var = p.box(222, 158, "z_mean", 90), p.box(222, 206, "z_log_var", 90)
    sigma, noise = p.box(333, 206, "exp(0.5·)"), p.dot(407, 266, "ε", RANDOM)
    times, plus, code = p.dot(407, 206, "×"), p.dot(407, 158, "+"), p.box(474, 158, "z")
    decoder, logits = p.box(555, 158, "decoder"), p.box(640, 158, "logits")
    kl = p.box(342, 50, "kl\n0.5 Σ (exp(z_log_var) + z_mean² − 1 − z_log_var)", 0, 46)
    error = p.box(503, 348, "reconstruction\nΣ binary_cross_entropy_with_logits", 354, 46)
    weight, total = p.box(628, 50, "× kl_weight"), p.dot(724, 182, "+")
    for route, *shapes in [
        ("h", x, encoder, encoded), ("h", z_mean, plus, code, decoder, logits),
        ("h", z_log_var, sigma, times), ("v", noise, times, plus), ("v", encoded, kl),
        ("h", kl, weight), ("hv", weight, total), ("v", logits, error), ("vh", x, error),
        ("hv", error, total), ("h", total, p.box(785, 182, "loss")),
    ]:  # fmt: skip
        p.link(route, *shapes)
    return p


def reparametrization() -> Picture:
    """Draw where the gradient flows if z is sampled inside the network, and if ε is an input."""
    p = Picture(440)

    def half(middle, title, formula, colour, columns, passes):
        """Draw one of the two graphs."""
        p.frame(middle, 220, 398, 420)
        p.words(middle, 34, title, weight="bold")
        p.words(middle - 20, 112, "forward", "right")
        p.words(middle + 22, 112, "gradient", "left", "bold")
        p.box(middle, 76, "reconstruction")
        p.box(middle, 148, "decoder", 119)
        p.box(middle, 220, formula, colour=colour)
        p.box(sum(columns) / 2, 392, "encoder", columns[1] - columns[0] + 83)
        links = [(middle, 93, 131, True), (middle, 165, 203, True)]
        for x, name in zip(columns, ("z_mean", "z_log_var")):
            p.box(x, 320, name, 83)
            links += [(x, 237, 303, passes), (x, 337, 375, passes)]
            if not passes:
                p.axes.plot([x + 8, x + 8], [238, 252], color=INK, lw=3, solid_capstyle="butt")
                p.words(x + 8, 262, "✕", size=22, weight="bold")
        for x, top, bottom, gradient in links:
            p.arrow((x - 8, bottom), (x - 8, top))
            if gradient:
                p.arrow((x + 8, top), (x + 8, bottom), colour=INK, line=3)

    inside, outside = "z ~ N(z_mean, exp(z_log_var))", "z_mean + exp(0.5 * z_log_var) * ε"
    half(211, "before: z is sampled inside", inside, RANDOM, (137, 285), False)
    half(619, "after: ε is an input", outside, GREY, (519, 627), True)
    p.dot(741, 320, "ε", RANDOM)
    p.arrow((741, 306), (741, 237))
    p.words(741, 348, "from N(0, I)")
    p.words(741, 392, "σ = exp(½ z_log_var)")
    p.words(211, 278, "no gradient\nthrough a sample")
    p.words(540, 270, "∂z/∂z_mean\n= 1", "left")
    p.words(648, 270, "∂z/∂z_log_var\n= ½ σ ε", "left")
    return p


def replay() -> Picture:
    """Draw how an experience is learned: first by the solver, then by the generator."""
    p = Picture(552)

    def step(y, title, names):
        """Draw the training of one network on current and replayed data."""
        (strategy, plugin, source, generate, made, teacher, label, target, new, known, learner,
         criterion) = names.split()  # fmt: skip
        now, past = y - 65, y + 80
        p.frame(WIDTH / 2, y - 8, WIDTH - 20, 258)
        p.words(26, y - 116, title, "left", "bold")
        p.words(26, now, "current minibatch", "left")
        p.names(
            (268, y - 116, f"{strategy}, {plugin}", "left"),
            (804, y - 116, "r = ratio = 1/k", "right"),
            (158, past + 32, generate), (399, past + 32, label),
            (534, y - 45, "torch.cat"), (765, y - 29, "r ×"), (741, y + 38, "(1 − r) ×"),
        )  # fmt: skip
        source, teacher = p.box(82, past, source, 112), p.box(318, past, teacher, 112)
        x, made = p.sheets(207, now, "x", CURRENT), p.sheets(207, past, made, REPLAYED)
        target = p.sheets(458, past, target, REPLAYED, width=58)
        new = p.sheets(534, y - 18, new, CURRENT, 22)
        known = p.sheets(534, y + 18, known, REPLAYED, 22)
        both = SimpleNamespace(x=534, y=y, width=54, height=0)
        model, loss = p.box(625, y, learner, 78), p.box(784, y, "loss")
        current = p.box(700, now, f"current\n{criterion}", 112, 46)
        past_loss = "reconstruction" if criterion == "negative_elbo" else criterion
        replayed = p.box(700, past, f"replayed\n{past_loss}", 112, 46)
        p.link("h", source, made, teacher, target, replayed, colour=REPLAYED)
        p.link("vh", made, known, colour=REPLAYED)
        p.link("h", both, model)
        for part in current, replayed:
            p.link("hv", model, part)
            p.link("hv", part, loss)
        return x, new, current

    x, new, current = step(
        149, "1  The solver learns experience k:", "GenerativeReplay DeepGenerativeReplayPlugin"
        " old_generator generate x old_model label targets x x model cross_entropy",
    )  # fmt: skip
    p.link("vh", x, new, colour=CURRENT)
    p.link("h", p.sheets(277, x.y, "y", CURRENT), current, colour=CURRENT)
    x, new, current = step(
        419, "2  Then the generator learns it:", "VAETraining ReplayAlignmentPlugin"
        " old_generator sample z old_generator decode x z z decoder negative_elbo",
    )  # fmt: skip
    encoder = p.box(318, new.y, "encoder", 0, 30)
    p.link("vh", x, encoder, colour=CURRENT)
    p.link("h", encoder, new, colour=CURRENT)
    p.link("h", x, current, colour=CURRENT)
    p.arrow((318, 386), (318, 363), (644, 363), colour=CURRENT)
    p.names((420, 376, "z_mean, z_log_var"))
    return p


def main() -> None:
    """Write each picture as SVG, its text as paths."""
    matplotlib.rcParams["svg.hashsalt"] = "schematics"  # the same file from every run
    for picture in scholar, vae, graph, reparametrization, replay:
        path = Path(__file__).with_name(f"scheme_{picture.__name__}.svg")
        figure = picture().figure
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
