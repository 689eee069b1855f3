"""The control groups that hold this process (cgroups(7), versions 1 and 2): folders whose files
limit what it and its relatives may take together."""

import re
from pathlib import Path

OWN = Path("/proc/self/cgroup")
MOUNTS = Path("/proc/self/mountinfo")
ESCAPED = re.compile(r"\\([0-7]{3})")  # space, tab, newline and backslash in a path


def own_groups(controller: str) -> list[Path]:
    """Folders of the groups in which `controller` ("memory", "cpu") may limit this process: its
    own, then those above it as far as they are mounted, since each of them limits all below it.
    systemd, Slurm and containers set limits at different heights."""
    try:
        lines = OWN.read_text("utf-8", "surrogateescape").splitlines()
        mounts = MOUNTS.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []
    paths = dict[str, str]()  # by controller; "" is version 2
    for line in lines:
        _, names, path = line.split(":", 2)
        paths |= dict.fromkeys(names.split(","), path)
    found = list[Path]()
    for mount in mounts:
        fields, _, file_system = mount.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        name = {"cgroup": controller, "cgroup2": ""}.get(kind)
        if name not in paths or (kind == "cgroup" and name not in options.split(",")):
            continue
        root, place = (_unescaped(field) for field in fields.split(" ")[3:5])
        found += _upwards(Path(place), root, paths[name])
    return found


def _upwards(place: Path, root: str, path: str) -> list[Path]:
    """The group `path` and those above it, of which `root` is mounted at `place`. In a container,
    `path` may be outside of what is mounted; then only `place` is visible."""
    inside = Path(path).is_relative_to(root) and ".." not in path.split("/")
    own = place / Path(path).relative_to(root) if inside else place
    return [own, *(above for above in own.parents if above.is_relative_to(place))]


def _unescaped(field: str) -> str:
    return ESCAPED.sub(lambda code: chr(int(code[1], 8)), field)
