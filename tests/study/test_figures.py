"""What all pictures have in common: one colour for an arm, legends that are whole, labels in words, grey on nothing."""

import matplotlib
import pytest
from matplotlib_inline.backend_inline import _fetch_figure_metadata

from masksae.files import shipped_profiles
from masksae.study.figures import reconstruction, style
from masksae.study.profile import load_profile

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402


@pytest.fixture(autouse=True)
def look():
    style.style()
    yield
    pyplot.close("all")


def test_an_arm_has_one_colour_in_every_picture_and_no_other_has_it():
    for name in shipped_profiles():
        arms = [arm.name for arm in load_profile(name).arms]
        for part in (arms, arms[::-1], arms[-2:]):
            assert style.palette(part) == {arm: style.COLOURS[arm] for arm in part}
    assert len(set(style.FAMILY)) == len(style.FAMILY)
    assert len(set(style.palette(["mine", "kept", "yours"]).values())) == 3
    assert len(style.palette([f"arm{i}" for i in range(30)])) == 30


def training(cells):
    history = [{"step": step, "explained_variance": 0.1 * step, "silent": 0} for step in range(5)]
    return [{"sae": f"{arm}-{grid}", "arm": arm, "grid": grid, "history": history} for arm, grid in cells]


def test_the_legend_of_the_training_has_every_arm_wherever_it_is_drawn():
    cells = [(arm, "topk20") for arm in style.COLOURS] + [("unmasked", f"topk{k}") for k in range(30, 37)]
    figure = reconstruction.draw_training(training(cells))
    [legend] = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == list(style.COLOURS)
    assert len(figure.axes) == 2 * 8 and figure.get_size_inches()[0] < 25
    assert figure.axes[0].get_title() == "TopK, L0 20" and all(axis.lines for axis in figure.axes)


def test_architectures_have_ticks_in_a_narrow_range_and_rivals_their_own_name():
    row = {"mode": "as_trained", "arm": "unmasked", "architecture": "TopK", "k": 20, "l0": 20.0}
    rows = [row | {"grid": "topk20", "ev_centred": 0.87}, row | {"grid": "ortsae20", "ev_centred": 0.81}]
    figure = reconstruction.draw_family(rows)
    low, high = sorted(figure.axes[0].get_ylim())
    assert len([tick for tick in figure.axes[0].get_yticks() if low <= tick <= high]) >= 3
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["unmasked", "TopK", "OrtSAE"]


def test_jupyterlab_puts_no_dark_card_behind_a_picture():
    figure = reconstruction.draw_training(training([("kept", "topk20")]))
    assert _fetch_figure_metadata(figure) == {"needs_background": "light"}
