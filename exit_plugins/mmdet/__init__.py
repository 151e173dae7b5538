"""The MMDetection wing: Dyn-Perceiver, and any plain timm model beside it, as detection backbones.

Importing it checks that mmcv has its compiled operators, because MMDetection does not say how to get them.
"""

from importlib import import_module

_INSTALL_OPS = """\
Compile them against the torch that is installed (about 5 minutes; "Detect" in README.md explains each part):
    pip install "setuptools>=80" wheel ninja packaging
    printf '#!/bin/sh\\nexec g++ "$@" -std=c++20\\n' > g++20 && chmod +x g++20
    CXX=$PWD/g++20 pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall "onedl-mmcv>=2.3.6,<2.4"\
"""


def check_mmcv_operators() -> None:
    """Raise RuntimeError, with the commands that help, unless mmcv and its compiled operators can be imported.

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
