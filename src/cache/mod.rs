//! Keys and values of running sequences.

mod pages;

pub use pages::{KvLayout, SequenceCache};
