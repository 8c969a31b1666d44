"""Projects that this package plugs into, one folder each."""
