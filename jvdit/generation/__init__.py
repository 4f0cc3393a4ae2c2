"""From requests to clips: conditioning, packing, solving, decoding."""
