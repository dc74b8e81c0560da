"""The demo world: small scenes with exact depth, normals, segments, outlines and captions."""
