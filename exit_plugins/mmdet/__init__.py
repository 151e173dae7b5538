"""The MMDetection wing: Dyn-Perceiver, and any plain timm model beside it, as detection backbones.

Importing it checks that mmcv has its compiled operators, because MMDetection does not say how to get them.
"""

from importlib import import_module

_INSTALL_OPS = """\
Compile them against the torch that is installed (5 to 10 minutes, a C++ compiler):
    python -m exit_plugins.install_mmdet\
"""


def check_mmcv_operators() -> None:
    """Raise RuntimeError, with the command that helps, unless mmcv and its compiled operators can be imported.

    It is no ImportError, which MMEngine replaces by one that names the module alone.
    """
    import torch  # the operators link against its libraries

    try:
        import_module("mmcv")
        import_module("mmcv._ext")
    except ModuleNotFoundError as error:
        what = "mmcv was installed without its compiled operators" if error.name == "mmcv._ext" else str(error)
        raise RuntimeError(f"MMDetection cannot run: {what}. {_INSTALL_OPS}") from error
    except ImportError as error:
        raise RuntimeError(
            f"MMDetection cannot run: mmcv's compiled operators do not load ({error}); they were compiled for another "
            f"torch than {torch.__version__}. {_INSTALL_OPS}"
        ) from error


check_mmcv_operators()

from .backbone import DynPerceiver, TimmBackbone  # noqa: E402  mmcv is checked first

__all__ = ["DynPerceiver", "TimmBackbone", "check_mmcv_operators"]
