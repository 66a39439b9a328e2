"""Checkpoints: format, saving in the background, gathering of shards, export."""
