"""From requests to clips: conditioning, packing, denoising, decoding."""
