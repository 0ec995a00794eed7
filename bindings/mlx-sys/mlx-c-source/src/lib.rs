//! Intentionally empty: see the manifest.
