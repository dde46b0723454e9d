"""The formats of adapters' folders; they take and return `Contents` and know of no `Adapter`."""
