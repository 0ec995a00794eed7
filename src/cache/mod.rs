//! Keys and values: which blocks there are and what they hold (pure), and the arrays that they lie in.

pub mod blocks;
pub mod fingerprint;
pub mod hot;
pub mod manager;
mod pages;
pub mod prefix;
pub mod rows;
pub mod spans;
pub mod ssd;
mod transfer;

pub use blocks::{BlockCounts, BlockId};
pub use manager::{BlockCopy, BlockManager, GroupKind, Save, Table};
pub use pages::{KvLayout, Pages, Writes, copy_places, place};
