//! Safe Rust over the C ABI of libomlx, and over nothing else of it.
//!
//! A [`Pool`] holds models; [`Pool::generate`], [`Pool::embed`] and [`Pool::rerank`] start a [`Request`], which is a stream of
//! [`Event`]s; a [`Download`] fetches a model. All handles are `Send` and `Sync`, and dropping one gives it back; a request
//! that is dropped is cancelled. Functions that wait say "Blocking": call them on a thread that may.
//!
//! Requests and settings are JSON texts, as `omlx.h` describes them.
//!
//! ```no_run
//! # async fn example() -> omlx_client::Result<()> {
//! use omlx_client::{Event, Pool, PoolOptions, RequestOptions};
//!
//! let pool = Pool::open(&PoolOptions::default())?;
//! let json = r#"{"messages":[{"role":"user","content":"Hello"}]}"#;
//! let mut request = pool.generate(json, RequestOptions::default())?;
//! while let Some(event) = request.next().await {
//!     if let Event::Text(piece) = event {
//!         print!("{}", piece.text);
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod cache;
mod download;
mod error;
mod event;
mod ffi;
mod library;
mod models;
mod pool;
mod request;
mod text;

pub use cache::{CacheLimits, Tiers};
pub use download::{Download, DownloadProgress, DownloadState};
pub use error::{Error, Result, Status};
pub use event::{Done, Embeddings, Event, FinishReason, Piece, Scores, TokenLogprob, ToolCall, Usage};
pub use library::{LogLevel, abi_version, mlx_version, set_log_hook, version};
pub use pool::{CacheCodec, Device, Dtype, Metrics, Pool, PoolOptions, Precision};
pub use request::{Request, RequestOptions};
