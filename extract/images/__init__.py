"""From the bytes of any image file to pixels: what it is, its orientation, size and colour."""
