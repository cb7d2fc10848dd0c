"""What a map was made from, in a few words that travel with each of its files.

Every raster and vector file of the map carries these as tags ``TERRALOOM_*``, so that a file
copied elsewhere still says what it is. No clock is involved: the same inputs give the same tags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from terraloom import __version__
from terraloom.config.campaign import Campaign
from terraloom.errors import StateError
from terraloom.io import digest_json, read_json, sha256
from terraloom.state import code_digest

__all__ = ["PINNED", "TAG", "config_digest", "map_digest", "map_tags", "used_scenes"]

#: What the names of all tags begin with. No colon: GDAL takes it for the end of the name.
TAG = "TERRALOOM_"
#: File in the folder of a model that came from a release.
PINNED = "pinned.json"
#: Longest list of scene ids that is written into each file, characters.
_IDS_LENGTH = 4000
#: Keys that say how or how fast a map is computed or judged, but change no pixel of it.
_NO_PIXEL = (
    "title", "license", "sample", "milestones", "grid.tiles_per_job", "scenes.jobs",
    "scenes.requests", "scenes.timeout_s", "predict.threads", "predict.device", "predict.window_px",
    "predict.batch", "model.processes", "model.baseline", "model.device", "regions",
)  # fmt: skip
#: Modules whose code makes the files of the map.
CODE = ("predict.engine", "predict.products")


def config_digest(campaign: Campaign) -> str:
    """Digest of every setting of a campaign, defaults included."""
    return digest_json(campaign.model_dump(mode="json"))


def map_digest(campaign: Campaign) -> str:
    """Digest of the settings that the pixels of the map depend on.

    Title, sample and the division into jobs are left out: with others the same map is made.
    """
    data = campaign.model_dump(mode="json")
    for key in _NO_PIXEL:
        *path, last = key.split(".")
        section: Any = data
        for part in path:
            section = section.get(part, {})
        section.pop(last, None)
    return digest_json(data)


def used_scenes(results: Path) -> list[str]:
    """Ids of the scenes that the cube was made from, in the order of the lock.

    Raises:
        StateError: The lock of scenes is missing or holds no items.
    """
    lock = Path(results) / "scenes" / "items.json"
    record = read_json(lock)
    if not isinstance(record, dict) or "items" not in record:
        raise StateError(
            "the key `items` is missing", where=lock.as_posix(),
            fix="rerun the stage that writes it",
        )  # fmt: skip
    return [str(i.get("id")) for i in record["items"] if i.get("decision", "use") == "use"]


def map_tags(campaign: Campaign, results: Path = Path("results")) -> dict[str, str]:
    """Tags of the files of a map.

    Args:
        campaign: The campaign.
        results: Folder with the milestones scenes, chips and model; what is not there is not
            told.

    Returns:
        Names (with the prefix) and values: campaign, digest of its keys, version and digest of
        the code, periods, scenes (count, digest, ids where they are few), labels (digest of the
        aligned labels), networks (count, digest of their weights), release of a pinned model.
    """
    periods = campaign.cube.periods
    told = {
        "CAMPAIGN": campaign.name,
        "CONFIG": map_digest(campaign),
        "VERSION": __version__,
        "CODE": code_digest(*CODE),
        "PERIOD": f"{min(p.start for p in periods)}/{max(p.end for p in periods)}",
    }
    if (results / "scenes/items.json").is_file():
        ids = used_scenes(results)
        told |= {"SCENES": str(len(ids)), "SCENES_DIGEST": digest_json(ids)}
        if len(" ".join(ids)) <= _IDS_LENGTH:
            told["SCENE_IDS"] = " ".join(ids)
    if (results / "chips/folds.gpkg").is_file():
        told["LABELS"] = sha256(results / "chips/folds.gpkg")[:16]
    cards = sorted((results / "model").glob("fold-*/member-*.json"))
    if cards:
        told["NETWORKS"] = str(len(cards))
        told["WEIGHTS"] = digest_json([read_json(c).get("sha256") for c in cards])
    pinned = results / "model" / PINNED
    if pinned.is_file():
        told["MODEL_RELEASE"] = str(read_json(pinned)["release"])
    return {TAG + key: value for key, value in told.items()}
