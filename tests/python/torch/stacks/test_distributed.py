"""DDP and FSDP2 on two ranks. Surgery comes first, then the wrapper."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.python.torch.stacks.ranks import CASES
from tests.python.torch.stacks.training import BF16, FP32

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of each rank: of each case, how far it is from stock in the same wrapper and from one process."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("ranks.py")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(folder)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.skipif(os.name != "posix", reason="gloo")
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_stock_and_one_process(case, found):
    tolerance = BF16 if "bf16" in case else FP32
    for rank in found:
        assert rank[case]["recipes"] > 0
        for other in ("stock", "one process"):
            assert rank[case][other]["loss"] <= tolerance
            assert rank[case][other]["moved"] <= tolerance
        assert not rank[case]["stock"]["warnings"]
