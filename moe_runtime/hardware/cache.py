"""A profile as a file, and where this machine's is kept.

Does not know how a profile comes about.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil

from moe_runtime.errors import ConfigError
from moe_runtime.files import write_text
from moe_runtime.hardware.host import processor_name, usable_cores
from moe_runtime.hardware.plain_data import read_value
from moe_runtime.hardware.values import HardwareProfile

__all__ = [
    "cache_folder",
    "cached_path",
    "cached_profile",
    "known_profile",
    "load_profile",
    "machine_key",
    "profile_from_dict",
    "profile_to_dict",
    "save_profile",
]

_LOG = logging.getLogger(__name__)

FORMAT, VERSION = "moe-runtime.hardware", 1


def profile_to_dict(profile: HardwareProfile) -> dict[str, Any]:
    """Plain data for JSON; `profile_from_dict` gives an equal profile."""
    # Through JSON and back: tuples become the lists that a file has.
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(profile), allow_nan=False))
    return {"format": FORMAT, "version": VERSION, **plain}


def profile_from_dict(data: Any) -> HardwareProfile:
    """A profile from plain data.

    Raises:
        ConfigError: another format or version, or a wrong field, which is named.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"no hardware profile: 'format' is not {FORMAT!r}")
    if data.get("version") != VERSION:
        raise ConfigError(
            f"a hardware profile of version {data.get('version')!r}, but this is version "
            f"{VERSION}; measure again (moe-runtime hardware --refresh)"
        )
    fields = {name: value for name, value in data.items() if name not in ("format", "version")}
    return read_value(HardwareProfile, fields, "profile")


def save_profile(profile: HardwareProfile, path: str | os.PathLike[str]) -> Path:
    """Write a profile's JSON file, whole or not at all; gives its path."""
    return write_text(path, json.dumps(profile_to_dict(profile), indent=1) + "\n")


def load_profile(path: str | os.PathLike[str]) -> HardwareProfile:
    """Read what `save_profile` wrote.

    Raises:
        ConfigError: no such file, no JSON, or no profile of this version; names the file.
    """
    try:
        return profile_from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON file ({error}); measure again") from error


def machine_key() -> str:
    """Name of the kind of machine: of its processor, cores and memory, not of the host's name.

    Homes are shared by many machines and containers change names; equal hardware may share a
    profile. GPUs are not in it: whoever uses a profile compares those, without starting any here.
    """
    memory = round(psutil.virtual_memory().total / (1 << 30))
    kind = f"{platform.machine()}|{processor_name()}|{usable_cores()}|{memory}"
    return hashlib.sha256(kind.encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """The folder of caches that the platform's convention gives the user.

    Raises:
        ConfigError: the user has no home.
    """
    try:
        home = Path.home()
    except RuntimeError as error:
        raise ConfigError("no home folder to cache in; name a folder (--cache-dir)") from error
    inside = {"darwin": "Library/Caches", "win32": "AppData/Local"}.get(sys.platform, ".cache")
    return home / inside / "moe-runtime"


def cached_path(folder: str | os.PathLike[str] | None = None) -> Path:
    """Where this machine's profile is kept; `folder` in the place of `cache_folder()`."""
    return Path(folder or cache_folder()) / f"hardware-{machine_key()}.json"


def cached_profile(folder: str | os.PathLike[str] | None = None) -> HardwareProfile | None:
    """This machine's profile; None if it has not been measured yet.

    Raises:
        ConfigError: the file is damaged or of another version, or there is no home.
    """
    path = cached_path(folder)
    try:
        there = path.is_file()
    except OSError as error:  # a home that belongs to someone else
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    return load_profile(path) if there else None


def known_profile(named: str | None) -> HardwareProfile | None:
    """The profile that an option names: a path, `"auto"` for this machine's, None for none.

    With `"auto"` a damaged file is none, with a warning: nobody asked for it.

    Raises:
        ConfigError: a path that cannot be read as a profile.
    """
    if named is None:
        return None
    if named != "auto":
        profile = load_profile(named)
        if profile.machine != machine_key():
            _LOG.warning("%s was measured on another kind of machine", named)
        return profile
    try:
        return cached_profile()
    except ConfigError as error:
        _LOG.warning("the hardware profile is not used: %s", error)
        return None
