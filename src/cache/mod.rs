//! Keys and values: which blocks there are and what they hold (pure), and the arrays that they lie in.

pub mod blocks;
pub mod fingerprint;
pub mod group;
pub mod hot;
pub mod manager;
mod pages;
pub mod prefix;
pub mod rows;
pub mod share;
pub mod snapshots;
pub mod spans;
pub mod ssd;
mod transfer;

pub use blocks::{BlockCounts, BlockId};
pub use group::GroupKind;
pub use manager::{BlockCopy, BlockManager, Save, Table};
pub use pages::{KvLayout, LayerLayout, Pages, Writes, copy_places, place};
pub use transfer::{places_filled_with, row_type};
