"""Files of any origin: reading within bounds, writing all or nothing."""
