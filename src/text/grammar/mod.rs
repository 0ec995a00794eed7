//! Answers that follow a grammar: which tokens may come next. Pure.
//!
//! ```text
//! Constraint ── GrammarVocabulary::compile ──▶ TokenMatcher ──▶ Guide ── mask ──▶ TokenMask ──▶ sampling
//!                (before generation starts)                       ▲                              │
//!                                                                 └────────── accept ◀── token ──┘
//! ```
//!
//! A [`GrammarVocabulary`] belongs to a model and is shared by its requests; a [`Guide`] belongs to a sequence. It lets the
//! model think first where it does so, ends the thinking when its budget is spent, and holds what follows to the constraint.
//! The grammars and their masks are those of the crate `llguidance`.

mod arguments;
mod calls;
mod compiled;
mod constraint;
mod guide;
mod mask;
mod matcher;
mod rules;
mod thinking;
mod values;
mod vocabulary;

pub use calls::ToolCalls;
pub use constraint::Constraint;
pub use guide::Guide;
pub use mask::TokenMask;
pub use matcher::TokenMatcher;
pub use thinking::{ThinkingMarkers, ThinkingStart};
pub use vocabulary::GrammarVocabulary;

#[cfg(test)]
mod tests;
