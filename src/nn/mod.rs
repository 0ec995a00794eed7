//! Building blocks of models on MLX arrays.
//!
//! Activations are packed: a step's `T` tokens, of whatever sequences, are the rows of one `[T, hidden]` array.
//! Only attention knows which rows belong together.

mod activation;
mod attention;
mod bidirectional;
mod check;
mod cross_layer;
mod decoder;
mod dense_and_experts;
mod embedding;
mod encoder;
mod experts;
mod gather;
mod heads;
mod latent;
mod linear;
mod mlp;
mod norm;
mod packed;
mod paged;
mod per_layer_input;
mod recurrent;
mod rope;
mod router;
mod whole;

pub use activation::Activation;
pub use attention::{Attention, AttentionSpec, NormOver, PositionScale, QkNorm};
pub use bidirectional::{ATTENTION_BYTES, Bidirectional, BidirectionalSpec, InputPaths};
pub use check::{check_paged, compare_paged};
pub use cross_layer::{CrossLayerAttention, CrossLayerSpec};
pub use decoder::{
    Decoder, DecoderSpec, FeedForwardSpec, LayerSpec, MixerSpec, NormPlacement, OutputHead, Step, StepGroup,
};
pub use dense_and_experts::{DenseAndExperts, DenseAndExpertsSpec};
pub use embedding::Embedding;
pub use encoder::{EncoderLayer, EncoderPaths, EncoderSpec, EncoderStack, NormPlace};
pub use experts::{Experts, ExpertsSpec, LatentExpertsSpec, SharedSpec};
pub use gather::Gathers;
pub use latent::{LatentAttention, LatentSpec};
pub use linear::Linear;
pub use mlp::{GatedMlp, GatedSpec, Mlp, MlpSpec};
pub use norm::{LayerNorm, Norm, NormKind, RmsNorm};
pub use packed::{PackedTexts, Run};
pub use paged::PagedIndex;
pub use per_layer_input::{LayerInput, PerLayerInputSpec, PerLayerInputs};
pub use recurrent::{
    DeltaNetSpec, DeltaProjections, Mamba2Spec, RecurrentLayer, RecurrentSpec, ShortConvSpec, StateIndex, StateLayout,
    StatePools,
};
pub use rope::{Rope, RopeSpec};
pub use router::RouterSpec;
pub use whole::WholeTexts;

pub use crate::kernels::{ExpertActivation, GroupScore, Groups, Normalize, Scores, Ties, Window};
