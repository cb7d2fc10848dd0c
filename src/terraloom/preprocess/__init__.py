"""From scenes to cubes: masks, co-registration, radiometry, composites."""
