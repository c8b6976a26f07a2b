"""timm and peft, imported once torchvision (which both import) is known to work."""

from task.torchvision_mend import mend_torchvision

mend_torchvision()

import peft  # noqa: E402
import timm  # noqa: E402

__all__ = ["peft", "timm"]
