"""PEP 517 backend: setuptools, plus torch as a build requirement only where the environment has none.

pip's build isolation hides site-packages from sys.path but not from sysconfig, so an installed torch is found and
compiled against: the kernels then fit the torch that will run them.
"""

import os
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the rest of the PEP 517 interface


def _torch_requirement() -> list[str]:
    if os.environ.get("LLMKERNELS_BUILD") == "none" or os.environ.get("LLMKERNELS_TORCH_ROOT"):
        return []
    places = (sysconfig.get_path(kind) for kind in ("platlib", "purelib"))
    if any(os.path.isdir(os.path.join(place, "torch", "include")) for place in places):
        return []
    return ["torch==2.13.0"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()
