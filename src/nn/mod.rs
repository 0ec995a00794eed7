//! Building blocks of models on MLX arrays.
//!
//! Activations are packed: a step's `T` tokens, of whatever sequences, are the rows of one `[T, hidden]` array.
//! Only attention knows which rows belong together.

mod attention;
mod check;
mod decoder;
mod embedding;
mod gather;
mod heads;
mod linear;
mod mlp;
mod norm;
mod paged;
mod rope;

pub use attention::{Attention, AttentionSpec};
pub use check::{check_paged, compare_paged};
pub use decoder::{Decoder, DecoderSpec, LayerSpec, Step};
pub use embedding::Embedding;
pub use gather::Gathers;
pub use linear::Linear;
pub use mlp::SwiGlu;
pub use norm::RmsNorm;
pub use paged::PagedIndex;
pub use rope::{Rope, RopeSpec};
