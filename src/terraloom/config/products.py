"""Keys of the products: how the map's files are laid out and what is made of the class map."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from terraloom.config.base import Section

__all__ = ["Products"]


class Products(Section):
    """Files of the map."""

    layout: Literal["mosaic", "tiles"] = Field(
        "mosaic",
        description="`mosaic`: one cloud-optimised GeoTIFF per product. `tiles`: one per product "
        "and tile, written by jobs, and an index per product that reads as one raster; for maps of "
        "more than about 1,000 tiles.",
    )
    index: Literal["auto", "vrt", "gti"] = Field(
        "auto",
        description="Index of layout `tiles`: `vrt` (any GDAL), `gti` (GDAL 3.9 or newer; any "
        "number of tiles); `auto` takes `gti` above 1,000 tiles.",
    )
    probability_bits: Literal[8, 16] = Field(
        8,
        description="Probabilities are stored in steps of 1/200 (8 bits) or 1/10000 (16 bits, "
        "larger files).",
    )
    minimum_mapping_unit_ha: float = Field(
        0, ge=0, le=10_000,
        description="Patches of a class smaller than this are given to the largest neighbour, in "
        "the further product `class_map_mmu`; 0 makes none (hectares).",
    )  # fmt: skip
    connectivity: Literal[4, 8] = Field(
        4,
        description="Pixels of one patch touch by their sides (4), or by sides or corners (8); "
        "for the minimum mapping unit and the polygons.",
    )
    vector: bool = Field(
        False, description="Also write the class map as polygons, `class_map.gpkg` (yes/no)."
    )
