"""Pictures of ledgers: what is drawn, and that files are written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import unswag
from unswag import policy
from unswag.ledger import LOSS_BUFFERS, Ledger, Row, role_of

plots = pytest.importorskip("unswag.report.plots", reason="pictures need matplotlib")


def ledger(modules: int = 2, **about) -> Ledger:
    names = [f"block_{chr(97 + i % 26)}{i // 26 * 'x'}.mlp" for i in range(modules)]
    rows = [Row(name, "mlp", (4,), "float32", 32.0, "device", 1 << 10 + i % 14) for i, name in enumerate(names)]
    return Ledger(rows, tokens=4, **about)


@pytest.fixture
def drawn(monkeypatch):
    """Draws ledgers; gives the figure."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))

    def draw(**sides: Ledger):
        plots.of_ledgers(sides, "nowhere.png")
        return figures.pop()

    return draw


@pytest.mark.parametrize("modules", [0, 1, 40])
def test_the_picture_is_written(tmp_path, modules):
    one = ledger(modules)
    one.plot(tmp_path / "one.png")
    one.compare(ledger(3)).plot(tmp_path / "two.png")
    for path in (tmp_path / "one.png", tmp_path / "two.png"):
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") >= 1000


def test_model_batch_and_total_stand_above_it(drawn):
    figure = drawn(stock=ledger(2, model="Llama", batch={"input_ids": (1, 8)}, loss_buffers=1 << 10))
    assert figure.get_suptitle() == "Llama: input_ids 1×8"
    assert figure.axes[0].get_title("left") == "stock, 4.0 KiB, 1,024 bytes per token"
    assert figure.axes[0].get_xlabel() == "saved for backward, KiB"


def test_loss_buffers_and_logits_are_drawn_and_named(drawn):
    one = ledger(2, loss_buffers=5 << 10)
    one.rows.append(Row("", "logits", (4, 9), "float32", 32.0, "device", 7 << 10))
    figure = drawn(one=one)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mlp", "logits", "loss buffers"]
    bars = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert bars == ["(the logits)", "(the loss)", "block_b.mlp", "block_a.mlp"]
    assert [text.get_text() for text in figure.axes[0].texts] == [" 7.0", " 5.0", " 2.0", " 1.0"]


def test_two_have_the_same_bars_and_one_scale(drawn):
    other = ledger(1, loss_buffers=100)
    other.rows.append(Row("", "residual", (4,), "float32", 32.0, "device", 10))
    figure = drawn(before=ledger(3), after=other)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mlp", "residual", "loss buffers"]
    left, right = figure.axes
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    assert [text.get_text() for text in left.texts] == [" 4.0", " 2.0", " 1.0", " 0.0", " 0.0"]
    assert [text.get_text() for text in right.texts] == [" 0.0", " 0.0", " 1.0", " 0.1", " 0.0"]
    assert left.get_title("left").startswith("before, 7.0 KiB") and right.get_title("left").startswith("after, 1.1 KiB")


def test_small_groups_share_the_last_bar(drawn):
    many = ledger(40)
    (panel,) = drawn(one=many).axes
    assert len(panel.texts) == plots.MOST_BARS and panel.get_yticklabels()[-1].get_text() == "others"
    drawn_bytes = sum(patch.get_width() for patch in panel.patches) * plots.unit(many.total)[0]
    assert drawn_bytes == pytest.approx(many.total)


def test_every_role_has_a_colour():
    names = ("x.lora_A", "x.norm", "x.attn", "x.mlp", "lm_head", "x")
    assert {role_of(name) for name in names} | set(policy.ROLES) | {LOSS_BUFFERS} == set(plots.COLOURS)


def test_units():
    assert [plots.unit(n) for n in (0, 1023, 1024, 3_000_000, 5 << 30)] == [
        (1, "bytes"), (1, "bytes"), (1 << 10, "KiB"), (1 << 20, "MiB"), (1 << 30, "GiB"),
    ]  # fmt: skip


def test_panels_have_the_style_of_the_house():
    figure, axes = plots.panels(1, 2)
    assert len(axes) == 2 and not any(one.spines[side].get_visible() for one in axes for side in ("top", "right"))
    assert tuple(figure.get_size_inches()) == (11, 3.8)


def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None; from unswag import Ledger\n"
        "try: Ledger().plot('x.png')\nexcept ModuleNotFoundError as e: print(e)"
    )
    environment = {"PYTHONPATH": str(Path(unswag.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "a picture needs the module 'matplotlib', which is not installed: pip install matplotlib"
