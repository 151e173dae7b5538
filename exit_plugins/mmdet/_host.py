"""Everything of MMEngine and mmcv that is not their public face: what this wing imports of them.

Of MMDetection itself no private name is used.
"""

from importlib import import_module

from .._hosts import check_names

__all__ = ["check_mmcv_operators", "get_torch_safe_globals"]

# mmcv's operators are checked before and by themselves, since their absence asks for another remedy.
RELIED_ON: dict[str, tuple[str, ...]] = {
    "mmengine.model.BaseModule": ("init_cfg",),
    "mmengine.model.BaseModule.init_weights": (),
    "mmengine.runner.checkpoint.get_torch_safe_globals": (),
}

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
check_names("mmengine", "onedl-mmengine", "onedl-mmengine>=0.10.12,<0.11", RELIED_ON)

from mmengine.runner.checkpoint import get_torch_safe_globals  # noqa: E402  checked first
