"""Processes in containers: pyxis makes them an option of srun, apptainer is a command before another."""

from pathlib import Path

from skipmega.errors import ConfigError
from skipmega.launch.slurm import client
from skipmega.launch.slurm.profile import Profile


def check_container(image: str, launcher: str, profile: Profile) -> None:
    """Refuse what would run without its container, or not at all.

    Raises:
        ConfigError: mpirun is to start it, which pyxis knows nothing of; or apptainer's image is no file.
    """
    if profile.containers == "pyxis":
        if launcher == "mpirun":
            raise ConfigError(
                f"--container {image}: pyxis is an option of srun, and --launcher mpirun would leave the "
                "container out: choose srun or torchrun, or containers: apptainer in the site profile"
            )
    elif "://" not in image and not Path(image).exists():
        raise ConfigError(
            f"--container {image} cannot be seen from here: give the path of an image, or a URI"
        )


def check_pyxis(image: str | None, profile: Profile) -> None:
    """Refuse what this cluster's srun cannot start.

    Raises:
        ConfigError: a container is asked for and pyxis is not installed.
        LaunchError: srun is missing.
    """
    if image is not None and profile.containers == "pyxis" and not client.srun_takes("--container-image"):
        raise ConfigError(
            f"--container {image}: this cluster's srun has no --container-image, which is pyxis's; if it has "
            "apptainer, put containers: apptainer into the site profile"
        )


def container_options(image: str | None, profile: Profile) -> list[str]:
    """What srun is told."""
    if image is None or profile.containers != "pyxis":
        return []
    mounts = ",".join(profile.container_mounts)
    return [f"--container-image={image}", *([f"--container-mounts={mounts}"] if mounts else [])]


def container_command(image: str | None, profile: Profile) -> list[str]:
    """What stands before every process's command."""
    if image is None or profile.containers != "apptainer":
        return []
    binds = [part for mount in profile.container_mounts for part in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *binds, image]
