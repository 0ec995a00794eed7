//! Downloads of models from the Hugging Face hub, or a mirror that speaks its protocol, into a folder of models.
//!
//! [`Download::start`] runs one on threads of its own. In order: the staging folder is locked ([`staging`]), the
//! revision resolved to a commit and its files listed ([`api`]), what an earlier attempt or version left is taken over,
//! the disk's room checked, the rest fetched by a few connections ([`transfer`], [`partial`]), every file checked
//! ([`checksum`]) and written through, and the whole folder put into its place at once.
//!
//! **Why not the crate `hf-hub`.** 1.0 is asynchronous (tokio, reqwest, the Xet client: 226 crates), fetches interrupted
//! files from their beginning, compares no checksums and has no limit for a silent server. The synchronous form of 0.5,
//! on `ureq`, resumes, but one file at a time, without checksums, cancelling or time limits, into the hub's own cache
//! layout of links. Neither checks the disk's room or lets a model arrive in one piece. What would be left is building
//! a URL. So this is `ureq` alone, with rustls and the provider `ring`, which a C compiler alone builds and which also
//! computes the checksums.
//!
//! **Certificates** are Mozilla's, built in (`webpki-roots`): the same on every system, containers without a store
//! included. Where a proxy puts its own in front, `SSL_CERT_FILE` names a PEM file that replaces them.

mod api;
mod checksum;
mod control;
mod download;
mod http;
mod partial;
mod pattern;
mod request;
mod settings;
mod staging;
mod transfer;
mod url;

pub use control::{OnProgress, Progress, State};
pub use download::{Arrival, Download, Tuning};
pub use request::{DownloadRequest, Token};
pub use settings::standard_cache;
