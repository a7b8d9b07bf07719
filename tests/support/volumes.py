"""A Secret's volume as kubelets write it: files that are links to `..data`, which is renamed in one step.

https://pkg.go.dev/k8s.io/kubernetes/pkg/volume/util#AtomicWriter
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path


class SecretVolume:
    """A folder with the files of a Secret; `volume["url"]` is the place of one."""

    def __init__(self, folder: Path, **contents: str) -> None:
        self.folder = folder
        self._numbers = itertools.count(1)
        folder.mkdir(parents=True)
        self.replace(**contents)
        for name in contents:
            (folder / name).symlink_to(f"..data/{name}")

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)

    def replace(self, **contents: str) -> None:
        """Write other contents, as a kubelet does when the Secret was changed."""
        fresh = self.folder / f"..2026_11_21_22_06_{next(self._numbers):02d}.1"
        fresh.mkdir()
        for name, text in contents.items():
            (fresh / name).write_text(text)
        data, interim = self.folder / "..data", self.folder / "..data_tmp"
        before = data.resolve() if data.exists() else None
        interim.symlink_to(fresh.name)
        os.rename(interim, data)
        if before is not None:
            shutil.rmtree(before)
