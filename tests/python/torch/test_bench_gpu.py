"""bench.gpu without a GPU: what its stages conclude, that they see a wrong bit, and that a run that was killed goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from bench import smollm2
from bench.gpu import __main__ as gpu
from bench.gpu import bandwidth, build, context, correctness, model, samples, sanitizer, sweep
from bench.gpu.record import Record, sources
from bench.gpu.stage import Notes, NotMeasured, Settings, at_least, at_most, failed

DRY = Settings("cpu", dry=True)
STAGES = (correctness, sanitizer, bandwidth, model, context)


# ---- comparing ------------------------------------------------------------------------------------------------------------


def test_one_different_bit_is_a_mismatch_and_a_nan_is_a_nan():
    x = samples.draw((5, 37), torch.bfloat16, 1)
    y = x.clone()
    assert x.isnan().any() and samples.mismatches(y, x) == 0
    y.view(torch.int16)[3, 5] ^= 1
    assert samples.mismatches(y, x) == 1
    y = x.clone()
    nan = x.isnan()
    y.view(torch.int16)[nan] |= 3  # another NaN
    assert samples.mismatches(y, x) == 0
    assert samples.mismatches(torch.tensor([0.0]), torch.tensor([-0.0])) == 1
    assert samples.mismatches(x.float(), x) == samples.mismatches(x[:2], x) == x.numel()


def test_float64_may_differ_by_rounding_alone():
    x = samples.draw((5, 37), torch.float64, 1)
    x[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert samples.far_apart(x, x) == samples.far_apart(x * (1 + 2e-16), x) == 0
    y = x * (1 + 2e-16)
    y[0, :5] = torch.tensor([1.0, torch.nan, torch.inf, 7.0, -0.0])
    assert samples.far_apart(y, x) == 3 + int(x[0, 3] != 7.0)
    assert samples.far_apart(x + 1e-9, x) > 100


def test_units_in_the_last_place():
    x = torch.tensor([1.0, -1.0, 0.0, 1e-45])
    assert samples.ulps(x, x) == 0
    assert samples.ulps(torch.nextafter(x, torch.tensor(9.0)), x) == 1
    assert samples.ulps(torch.tensor([1e-45]), torch.tensor([-1e-45])) == 2
    assert samples.ulps(torch.tensor([-0.0]), torch.tensor([0.0])) == 0


def test_every_op_has_samples_and_is_swept(monkeypatch):
    assert samples.registered() == set(samples.OPS)
    seen, call = set(), sweep.call

    def dtype(args):
        """Of the first argument that has or is a floating one."""
        found = (a if isinstance(a, torch.dtype) else getattr(a, "dtype", None) for a in args)
        return next(d for d in found if d is not None and d.is_floating_point)

    monkeypatch.setattr(sweep, "call", lambda op, args: seen.add((op, dtype(args))) or call(op, args))
    assert sweep.sweep("cpu")["unsupported"] == []
    assert seen == {(op, dtype) for op in samples.OPS for dtype in samples.DTYPES}


def test_views_on_the_device_are_those_of_the_samples(monkeypatch):
    seen = []
    monkeypatch.setattr(sweep, "call", lambda op, args: seen.append(args) or [])
    args = next(samples.arguments("gated_forward", torch.float32, (2, 3, 33)))
    sweep._once("gated_forward", args, "cpu", samples.columns)
    gate, up, _ = seen[0]
    assert gate.stride() == (3 * 38, 38, 1) and gate.untyped_storage().nbytes() == 2 * 3 * 38 * 4
    assert samples.mismatches(gate, args[0]) == samples.mismatches(up, args[1]) == 0


WORK = correctness.pieces(DRY)
SEES = ["golden", "exhaustive bfloat16", "rows float32", "layouts float16", "again", "compile", "large",
        "pairs activation_backward silu float16"]  # fmt: skip


@pytest.mark.parametrize("piece", [p for p in WORK if not p.startswith(("pairs", "jax", "surgery"))] + SEES[-1:])
def test_pieces_find_nothing_wrong(piece):
    try:
        result = correctness.run(piece, DRY, Notes())
    except NotMeasured as why:
        assert piece in ("graphs", "streams") and "need a GPU" in str(why)
        return
    assert result["checks"] and failed(result["checks"]) == []


@pytest.mark.parametrize("piece", SEES)
def test_pieces_see_one_wrong_bit(piece, monkeypatch):
    """Every other call of an op gives one wrong bit in its last result that has a number."""
    calls = 0

    def wrong(op, args):
        nonlocal calls
        calls += 1
        out = [x.clone() for x in samples.call(op, args)]
        if calls % 2:
            x = out[-1].view(-1)
            for i in (~x.isnan()).nonzero().flatten()[:1]:
                x[i : i + 1].view(torch.uint8).bitwise_xor_(1)
        return out

    monkeypatch.setattr(correctness, "call", wrong)
    result = correctness.run(piece, DRY, Notes())
    assert any("mismatches" in finding for finding in failed(result["checks"]))


def test_golden_sees_a_value_that_is_off():
    truth = torch.linspace(-2, 2, 100, dtype=torch.float64)
    assert correctness.far(truth.float(), truth) == 0
    assert correctness.far(truth.float() * (1 + 1e-5), truth) > 50


def test_gradients_see_what_is_less_exact_than_torch(monkeypatch):
    real = correctness.functions()
    coarse = {"silu": (lambda x: real["silu"][0](x) * (1 + 1e-3), *real["silu"][1:])}
    monkeypatch.setattr(correctness, "functions", lambda: coarse)
    assert failed(correctness.gradients(DRY)["checks"]) != []


def test_parts_reach_the_last_element_and_cut_packed_rows_at_bytes():
    for shape in (correctness.BIG, correctness.BIG_ROW, correctness.NOT_BIG, (1, 100), (1, 1 << 24), (1, (1 << 24) + 33)):
        parts = correctness._parts(shape)
        rows, columns = parts[-1]
        assert (rows.stop, columns.stop) == (shape[0], None)
        assert parts[0][0].start == parts[0][1].start == 0
        assert all(c.start % 32 == 0 for _, c in parts)
    assert all(a * b > 2**31 for a, b in (correctness.BIG, correctness.BIG_ROW))


def test_pairs_go_on_where_they_were(monkeypatch):
    kept = {"0": [7, 1]}
    piece = "pairs gated_forward relu float16"
    result = correctness.run(piece, DRY, Notes(kept))
    assert (result["compared"], result["mismatches"]) == (7 + 65536, 1) and kept["1"] == [65536, 0]


# ---- the sanitizer --------------------------------------------------------------------------------------------------------

SWEPT = '{"calls": 384, "unsupported": [], "seconds": 3.0}\n'
BLOCK = """\
========= Invalid __global__ read of size 4 bytes
=========     at {kernel}+0x130
=========     by thread (31,0,0) in block (2,0,0)
=========     Address 0x7f5c4a000a00 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f5c4a000800 of size 512 bytes
========= 
"""
OURS = BLOCK.format(kernel="void unswag::cuda::relu_forward<float>(unswag::cuda::Rows)")
THEIRS = BLOCK.format(kernel="void at::native::elementwise_kernel<128, 4>(int)")
RACE = """\
========= Error: Race reported between Write access at void unswag::cuda::rms_norm<float>(Args)+0x90
=========     and Read access at void unswag::cuda::rms_norm<float>(Args)+0x120 [16 hazards]
========= 
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def summary(n):
    return f"========= ERROR SUMMARY: {n} error{'s' * (n != 1)}\n"


@pytest.mark.parametrize(
    ("text", "ours", "of_others", "findings"),
    [
        (SWEPT + summary(0), 0, 0, 0),
        (SWEPT + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, 0, 0),
        (OURS + SWEPT + OURS + THEIRS + summary(3), 2, 1, 1),
        (THEIRS + SWEPT + summary(1), 0, 1, 0),
        (SWEPT + RACE, 1, 0, 1),
        (BLOCK.replace("Invalid __global__ read", "Uninitialized __global__ memory read").format(kernel="unswag::f") + SWEPT
         + summary(1), 1, 0, 1),
        (SWEPT + "========= A finding in words that nobody knows\n=========     at its place\n" + summary(1), 0, 0, 1),
        (SWEPT + THEIRS + "========= Words that nobody knows\n=========     at unswag::f\n" + summary(2), 0, 1, 1),
    ],
)  # fmt: skip
def test_sanitizer_findings_are_counted(text, ours, of_others, findings):
    found = sanitizer.judged("========= COMPUTE-SANITIZER\n" + text, 0)
    assert (found["ours"], found["of_others"], len(failed(found["checks"]))) == (ours, of_others, findings)


def test_a_sanitized_run_that_broke_off_is_an_error():
    for text in (SWEPT, summary(0), "========= Error: Device not supported\n"):
        with pytest.raises(RuntimeError, match="did not come to its end"):
            sanitizer.judged(text, 1)


# ---- bandwidth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", bandwidth.KERNELS)
def test_every_kernel_has_a_row_and_a_peer(kernel):
    result = bandwidth.measure(kernel, torch.bfloat16, DRY)
    assert result["of_copy"] > 0 and (result["peers_seconds"] or kernel == "rms_norm again")
    assert not any("Error" in why for why in result["not_measured"])


def test_share_of_the_copy(monkeypatch):
    turn = iter([[2.0, 1.0], [3.0, 4.0], [1.5], [6.0], [2.0]])  # copy, ours, copy, two peers
    monkeypatch.setattr(bandwidth, "seconds", lambda *_: next(turn))
    monkeypatch.setattr(torch, "compile", lambda f: f)
    result = bandwidth.measure("swiglu forward", torch.float32, Settings("cpu", dry=True))
    n = 1 << 14
    assert result["moved_bytes"] == 3 * 4 * n and result["copy_bytes_per_second"] == 2 * 4 * n / 1.0
    assert result["of_copy"] == pytest.approx((3 / 2) * 1.0 / 3.0)


# ---- models and contexts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "parameters"), [("TinyLlama-1.1B", 1_100_048_384), ("Llama-3.1-8B, 4 layers", 1_923_125_248)]
)
def test_shapes(shape, parameters):
    found = model.Model(model.Job(shape, "full", "bfloat16", 8), "stock", "meta")
    assert sum(p.numel() for p in found.model.parameters()) == parameters
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}


def test_models_run_and_our_losses_are_stocks():
    pieces = {p: model.run(p, DRY, Notes()) for p in model.pieces(DRY) if "liger" not in p}
    assert len(pieces) == 4
    for r in pieces.values():
        assert failed(r["checks"]) == [] and len(r["losses"]) == 2 and r["losses"][1] < r["losses"][0]
    assert {"rms_norm", "gated_mlp", "loss", "stash"} <= pieces["dry, full, bfloat16, 64 tokens, ours"]["patched"].keys()
    checks = model.checks(pieces)
    assert sum(c["must"] for c in checks.values()) == 2
    assert not [f for f in failed(checks) if "goal" not in f]


def test_models_are_judged():
    def side(name, loss=2.0, seconds=1.0, peak=100):
        return {"job": "x, bfloat16", "side": name, "losses": [2.5, loss], "seconds": {"best": seconds}, "peak_bytes": peak}

    good = {"a": side("stock"), "b": side("liger"), "c": side("ours")}
    assert len(model.checks(good)) == 5 and failed(model.checks(good)) == []
    assert len(failed(model.checks(good | {"c": side("ours", loss=2.02)}))) == 1
    assert len(failed(model.checks(good | {"c": side("ours", seconds=1.1)}))) == 2
    assert len(failed(model.checks(good | {"b": side("liger", peak=99)}))) == 1
    assert model.checks({"a": side("stock")}) == {}


@pytest.mark.parametrize("per_token", [30_000, 90_000, 200_000, 3_000_000])
@pytest.mark.parametrize("usable", [1.0, 0.97, 0.8])
@pytest.mark.parametrize("bend", [0, 0.02, 0.3])
def test_the_longest_context_is_found(per_token, usable, bend):
    cap, tried = 16 * 2**30, []

    def trial(lengths):
        tried.append(tuple(lengths))
        peaks = [int(2.4e9 + per_token * n + bend * n * n) for n in lengths]
        return {"fits": True, "peaks": peaks} if max(peaks) <= cap * usable else {"fits": False}

    found = context.search(trial, cap, context.STEP, context.SHORT)
    assert len(set(tried)) == len(tried) == found["trials"] <= 14
    tokens = found["tokens"]
    assert tokens % context.STEP == 0 and not trial([tokens + context.STEP])["fits"]
    assert trial([tokens])["fits"] and found["peak_bytes"] == trial([tokens])["peaks"][0]
    if usable > 0.9 and bend < 0.3 and per_token > 30_000:
        assert found["trials"] <= 6


@pytest.mark.parametrize("side", ["stock", "ours"])
def test_where_no_kernel_takes_grouped_keys_they_are_repeated(monkeypatch, side):
    from transformers.integrations import sdpa_attention

    grouped, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def picky(q, k, v, **options):
        if options.get("enable_gqa"):
            raise RuntimeError("No available kernel. Aborting execution.")
        grouped.append(k.shape[1] != q.shape[1])
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)  # put back afterwards
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", picky)
    result = context.attempt(context.DRY_CASES["dry: 1 MiB"].__dict__, side, [32, 64], "cpu")
    assert result["fits"] and result["repeated"] and len(result["losses"]) == 2
    assert grouped and not any(grouped)


def test_other_faults_of_a_trial_are_no_answer(monkeypatch):
    def fault(self):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(model.Model, "step", fault)
    with pytest.raises(RuntimeError, match="illegal"):
        context.attempt(context.DRY_CASES["dry: 1 MiB"].__dict__, "stock", [32], "cpu")


def test_no_context_fits():
    assert context.search(lambda lengths: {"fits": False}, 1, 2048, (2048, 8192))["tokens"] == 0
    assert context.search(lambda lengths: {"cannot": "absent"}, 1, 2048, (2048, 8192)) == {"cannot": "absent"}


def test_a_killed_search_goes_on(monkeypatch):
    asked = []

    def in_process(case, side, lengths, settings):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((side, lengths))
        return context.attempt(case.__dict__, side, lengths, "cpu")

    monkeypatch.setattr(context, "in_process", in_process)
    kept: dict = {}
    with pytest.raises(KeyboardInterrupt):
        context.run("dry: 1 MiB", DRY, Notes(kept))
    assert len(kept) == 3
    first, asked[:] = list(asked), []
    monkeypatch.setattr(
        context, "in_process", lambda c, s, n, _: asked.append((s, n)) or context.attempt(c.__dict__, s, n, "cpu")
    )
    result = context.run("dry: 1 MiB", DRY, Notes(kept))
    assert result["sides"]["ours"]["tokens"] == result["sides"]["stock"]["tokens"] == 288  # (2^20 - 100,000) / 3,000 = 316
    assert not set(map(str, asked)) & set(map(str, first)) and failed(result["checks"]) == []


# ---- records, workers, stages ---------------------------------------------------------------------------------------------

MACHINE = {"gpu": "a", "torch": "2"}


def test_a_record_counts_for_its_sources_its_gpu_and_its_torch(tmp_path):
    record = Record("gpu-x", "x", tmp_path, MACHINE, "sources")
    record.piece("one", {"figure": 1})
    record.piece("two", {"error": "broken"})
    record.part("three", "a", 5)
    again = Record("gpu-x", "x", tmp_path, MACHINE, "sources")
    assert again.done(["one", "two", "three"]) == ["one"] and again.data["parts"] == {"three": {"a": 5}}
    for other in (
        Record("gpu-x", "x", tmp_path, MACHINE, "other sources"),
        Record("gpu-x", "x", tmp_path, MACHINE | {"gpu": "b"}, "sources"),
        Record("gpu-x", "x", tmp_path, MACHINE, "sources", again=True),
    ):
        assert other.done(["one"]) == [] and other.data["parts"] == {}
    again.piece("three", {"figure": 3})
    assert again.data["parts"] == {} and json.loads((tmp_path / "gpu-x.json").read_text())["pieces"]["three"] == {"figure": 3}


def test_sources_change_with_the_library_and_the_stage(tmp_path):
    for name in ("src/a.cpp", "src/cuda/b.cu", "python/unswag/c.py", "bench/gpu/stage.py", "bench/gpu/one.py",
                 "bench/gpu/two.py", "python/unswag/_core.abi3.so", "bench/results/d.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    stage = tmp_path / "bench/gpu/one.py"
    before = sources(stage, tmp_path)
    for name, changes in (("python/unswag/_core.abi3.so", False), ("bench/results/d.json", False), ("bench/gpu/two.py", False),
                          ("src/cuda/b.cu", True), ("python/unswag/c.py", True), ("bench/gpu/one.py", True),
                          ("bench/gpu/stage.py", True)):  # fmt: skip
        (tmp_path / name).write_text("2")
        after = sources(stage, tmp_path)
        assert (after != before) == changes, name
        before = after


FAKE = """
import os, pathlib, time
from bench.gpu.stage import NotMeasured, holds, at_most
NAME, TITLE = "gpu-fake", "made for the test"
HERE = pathlib.Path(__file__).parent
def pieces(settings): return ["good", "absent", "raises", "dies", "slow", "wrong"]
def run(piece, settings, notes):
    with (HERE / "log").open("a") as f: f.write(piece + "\\n")
    print("noise on stdout")
    if piece == "good": time.sleep(5)
    if piece == "absent": raise NotMeasured("nothing is there")
    if piece == "raises" and not (HERE / "mended").exists(): raise ValueError("no good")
    if piece == "dies" and not (HERE / "mended").exists(): os.abort()
    if piece == "slow":
        first = notes.get("half", lambda: 21)
        if not (HERE / "mended").exists(): time.sleep(60)
        return {"figure": 2 * first}
    return {"pid": os.getpid(), "checks": {"it is right": holds(piece != "wrong"), "goal": at_most(2, 1, must=False)}}
def checks(pieces): return {"all of them": holds(True)}
def table(pieces): return ("piece",), [(p,) for p in pieces]
"""


def test_a_stage_goes_on_after_faults_and_after_its_end(tmp_path, monkeypatch, capsys):
    (tmp_path / "fake_gpu_stage.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gpu, "BEAT", 0.5)
    environment = build.environment(dry=True)
    environment["PYTHONPATH"] += f":{tmp_path}"
    results = tmp_path / "results"

    def run(budget):
        return gpu.run_stage("fake_gpu_stage", DRY, results, environment, budget=budget)

    worker = gpu.Worker("fake_gpu_stage", DRY, environment)
    monkeypatch.setattr(gpu, "Worker", lambda *_: worker)
    ask = worker.ask

    def described(piece, *rest):
        return {"result": dict(MACHINE)} if piece == "machine" else ask(piece, *rest)

    monkeypatch.setattr(worker, "ask", described)
    stage, record = run(10)
    assert list(record.data["pieces"]) == ["good", "absent", "raises", "dies"] and not record.data["complete"]
    assert record.data["parts"] == {"slow": {"half": 21}}
    assert record.data["pieces"]["raises"]["error"] == "ValueError: no good"
    assert "SIGABRT" in record.data["pieces"]["dies"]["error"]
    assert record.data["not_measured"] == ["absent: nothing is there"]
    assert gpu.summary([(stage, record)]) == 1
    assert "slow: " in capsys.readouterr().err  # a sign of life

    (tmp_path / "mended").touch()
    stage, record = run(10)
    assert (tmp_path / "log").read_text().split() == [
        "good",
        "absent",
        "raises",
        "dies",
        "slow",
        "raises",
        "dies",
        "slow",
        "wrong",
    ]
    assert record.data["complete"] and record.data["pieces"]["slow"]["figure"] == 42
    assert record.data["findings"] == ["wrong: it is right: False"]  # a dry run has no goals
    assert record.data["checks"]["all of them"]["reached"]
    assert gpu.summary([(stage, record)]) == 1
    record.data["checks"].pop("wrong: it is right")
    assert gpu.summary([(stage, record)]) == 0
    record.data["complete"] = False
    assert gpu.summary([(stage, record)]) == 2


def test_a_missed_goal_is_told_apart_from_what_must_hold():
    checks = {"a": at_most(2, 1), "b": at_least(2, 3, must=False), "c": at_most(1, 1)}
    assert failed(checks) == ["a: 2, at most 1", "goal missed: b: 2, at least 3"]


def test_without_a_gpu_there_is_one_clear_error(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "no_gpu", lambda: "the NVIDIA driver sees no GPU")
    assert gpu.main(["--stage", "1"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == ["gpu-check: the NVIDIA driver sees no GPU; run it on a machine with a GPU, or try the logic with --dry-run"]


def test_a_dry_run_writes_to_a_folder_of_its_own(monkeypatch, tmp_path):
    seen = []

    def run_stage(name, settings, folder, environment, **rest):
        seen.append((name, settings, Path(folder), rest))
        return stage, Record("gpu-x", "x", tmp_path, MACHINE, "s")

    stage = type("Stage", (), {"NAME": "gpu-x", "table": staticmethod(lambda pieces: (("a",), []))})
    monkeypatch.setattr(gpu, "run_stage", run_stage)
    assert gpu.main(["--dry-run", "--stage", "2", "3"]) == 2
    assert [name for name, *_ in seen] == ["bench.gpu.sanitizer", "bench.gpu.bandwidth"]
    assert all(s == DRY and smollm2.RESULTS not in (folder, *folder.parents) for _, s, folder, _ in seen)
    assert all(rest["build_within"] is None for *_, rest in seen)


@pytest.mark.parametrize("stage", STAGES)
def test_stages_keep_to_their_interface(stage):
    for settings in (DRY, Settings()):
        pieces = stage.pieces(settings)
        assert pieces and len(set(pieces)) == len(pieces)
    assert stage.checks({}) == {} and stage.table({})[1] == []
    assert f"`{stage.NAME}.json`" in (smollm2.ROOT / "docs" / "gpu.md").read_text()


def test_the_package_is_linked_without_its_module(tmp_path):
    package, at = tmp_path / "python" / "unswag", tmp_path / "site" / "unswag"
    (package / "torch").mkdir(parents=True)
    for name in ("__init__.py", "_core.abi3.so", "_core.pyi", "torch/ops.py"):
        (package / name).write_text(name)
    build.link(package, at)
    (at / "_core.cpython-312.so").write_text("built here")
    (package / "__init__.py").rename(package / "other.py")
    build.link(package, at)
    assert sorted(p.name for p in at.iterdir()) == ["_core.cpython-312.so", "other.py", "torch"]
    assert (at / "torch" / "ops.py").read_text() == "torch/ops.py" and (at / "_core.cpython-312.so").read_text() == "built here"


def test_a_wheel_that_does_not_fit_is_named(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "nothing-1.0-cp27-cp27m-win32.whl").write_bytes(b"no wheel")
    (refused,) = build.install_wheels(tmp_path / "wheels", tmp_path / "at")
    assert (
        refused.startswith("nothing-1.0-cp27-cp27m-win32.whl could not be installed: ") and "not a supported wheel" in refused
    )
    assert build.install_wheels(tmp_path / "absent", tmp_path / "at") == []


def test_the_build_is_for_this_python():
    command = build.configure()
    assert f"-DPython_EXECUTABLE={sys.executable}" in command and "-DUNSWAG_CUDA=ON" in command
    assert not any(str(smollm2.ROOT / "python") in word for word in command)
