"""The mend of torchvision: where it is needed, where it is not, and what it does not hide. Each in a fresh process."""

import pytest

NEEDS_OPERATOR = """
import torch
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
"""

HEALTHY = """
import torch
torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@pytest.fixture
def stub(tmp_path):
    """Write a torchvision whose import does what it is told; return the folder for the path."""

    def write(program):
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(program)
        return tmp_path

    return write


def test_timm_and_transforms_work_and_nms_raises_where_it_was_mended(run_python):
    done = run_python(
        "from task.torchvision_mend import mend_torchvision\n"
        "mended = mend_torchvision()\n"
        "assert not mend_torchvision(), 'a second call has nothing to do'\n"
        "import timm, torch, torchvision\n"
        "from torchvision.transforms import v2\n"
        "image = torch.zeros(3, 8, 8, dtype=torch.uint8)\n"
        "assert v2.Resize(4)(image).shape == (3, 4, 4)\n"
        "assert timm.is_model('vit_tiny_patch16_224')\n"
        "try:\n"
        "    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
        "except RuntimeError:\n"
        "    assert mended\n"
        "else:\n"
        "    assert not mended\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_torchvision_without_its_operators_is_mended(run_python, stub):
    done = run_python(
        "from task.torchvision_mend import mend_torchvision\n"
        "assert mend_torchvision() is True\n"
        "import torch, torchvision\n"
        "assert mend_torchvision() is False\n"
        "try:\n"
        "    torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
        "except NotImplementedError:\n"
        "    print('nms raises')\n",
        stub(NEEDS_OPERATOR),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "nms raises\n"


def test_a_healthy_torchvision_is_imported_once_and_left_alone(run_python, stub):
    done = run_python(
        "from task.torchvision_mend import mend_torchvision\n"
        "assert mend_torchvision() is False\n"
        "import torch\n"
        "assert not hasattr(torch.ops.torchvision, 'qnms'), 'nothing was declared'\n",
        stub(f"{HEALTHY}print('imported')\n"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "imported\n"


def test_any_other_failure_is_not_hidden(run_python, stub):
    done = run_python(
        "from task.torchvision_mend import mend_torchvision\nmend_torchvision()\n",
        stub("print('tried')\nraise RuntimeError('compiled for another processor')\n"),
    )
    assert done.returncode == 1
    assert done.stdout == "tried\n"
    assert done.stderr.splitlines()[-1] == "RuntimeError: compiled for another processor"
