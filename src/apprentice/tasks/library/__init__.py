"""The task library: `<cluster>/<task>.yaml`, one file a task."""
