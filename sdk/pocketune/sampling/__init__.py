"""Which photo, crop, timestep and noise each training sample uses."""
