"""Position of the sun from date and place, for items that do not record it."""

from __future__ import annotations

import math
from datetime import UTC, datetime

__all__ = ["sun_position"]

_J2000 = datetime(2000, 1, 1, 12, tzinfo=UTC)


def sun_position(when: datetime, lon_deg: float, lat_deg: float) -> tuple[float, float]:
    """Azimuth and elevation of the sun's centre, without refraction and parallax.

    Low-precision solar coordinates of Meeus, "Astronomical Algorithms" (2nd ed., chapter 25), as
    used by the NOAA solar calculator; good to about 0.02 degrees between 1900 and 2100.

    Args:
        when: Instant; taken as UTC when it has no time zone.
        lon_deg: Longitude, degrees, east positive.
        lat_deg: Latitude, degrees, north positive.

    Returns:
        Azimuth (degrees clockwise from north, 0-360) and elevation above the horizon (degrees).
    """
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    days = (when - _J2000).total_seconds() / 86400
    t = days / 36525
    mean_lon = 280.46646 + t * (36000.76983 + t * 0.0003032)
    anomaly = math.radians(357.52911 + t * (35999.05029 - 0.0001537 * t))
    centre = (
        math.sin(anomaly) * (1.914602 - t * (0.004817 + 0.000014 * t))
        + math.sin(2 * anomaly) * (0.019993 - 0.000101 * t)
        + math.sin(3 * anomaly) * 0.000289
    )
    node = math.radians(125.04 - 1934.136 * t)
    apparent = math.radians(mean_lon + centre - 0.00569 - 0.00478 * math.sin(node))
    tilt = math.radians(23.4392911 - 0.0130042 * t + 0.00256 * math.cos(node))
    declination = math.asin(math.sin(tilt) * math.sin(apparent))
    ascension = math.atan2(math.cos(tilt) * math.sin(apparent), math.cos(apparent))
    sidereal = 280.46061837 + 360.98564736629 * days + lon_deg
    hour = math.radians(sidereal) - ascension
    lat = math.radians(lat_deg)
    up = math.sin(lat) * math.sin(declination) + math.cos(lat) * math.cos(declination) * math.cos(
        hour
    )
    east = -math.cos(declination) * math.sin(hour)
    north = math.sin(declination) * math.cos(lat) - math.cos(declination) * math.cos(
        hour
    ) * math.sin(lat)
    return math.degrees(math.atan2(east, north)) % 360, math.degrees(math.asin(up))
