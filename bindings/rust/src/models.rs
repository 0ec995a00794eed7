//! The models of a pool.

use std::path::Path;

use crate::error::{Result, check};
use crate::ffi;
use crate::pool::Pool;
use crate::text::{OptionalText, c_text};

impl Pool {
    /// All models, a JSON array.
    pub fn models(&self) -> Result<String> {
        // SAFETY: the pool is alive.
        self.text(|pool, text, error| unsafe { ffi::omlx_pool_models(pool, text, error) })
    }

    /// Adds the model in `folder`. Blocking while its config is read.
    pub fn add_model(&self, folder: &Path, id: Option<&str>) -> Result<()> {
        let (folder, id) = (OptionalText::path("folder", Some(folder))?, OptionalText::new("id", id)?);
        // SAFETY: the pool and the texts live for the call.
        check(|error| unsafe { ffi::omlx_pool_add_model(self.pointer(), folder.pointer(), id.pointer(), error) })
    }

    /// Looks into the pool's folders again. Blocking.
    pub fn rescan(&self) -> Result<()> {
        // SAFETY: the pool is alive.
        check(|error| unsafe { ffi::omlx_pool_rescan(self.pointer(), error) })
    }

    /// Loads a model and waits until it is ready. Blocking.
    pub fn load_model(&self, id: &str) -> Result<()> {
        let id = c_text("id", id)?;
        // SAFETY: the pool and the id live for the call.
        check(|error| unsafe { ffi::omlx_model_load(self.pointer(), id.as_ptr(), error) })
    }

    /// Unloads a model and returns the bytes that became free. With `drain` its requests end first. Blocking.
    pub fn unload_model(&self, id: &str, drain: bool) -> Result<u64> {
        let (id, mut freed) = (c_text("id", id)?, 0);
        // SAFETY: the pool, the id and the output live for the call.
        check(|error| unsafe { ffi::omlx_model_unload(self.pointer(), id.as_ptr(), drain.into(), &mut freed, error) })?;
        Ok(freed)
    }

    /// Changes what is settled about a model, by a JSON object.
    pub fn configure_model(&self, id: &str, settings: &str) -> Result<()> {
        let id = c_text("id", id)?;
        let (data, len) = (settings.as_ptr().cast(), settings.len());
        // SAFETY: the pool and the texts live for the call.
        check(|error| unsafe { ffi::omlx_model_configure(self.pointer(), id.as_ptr(), data, len, error) })
    }

    /// What is settled about a model, a JSON object.
    pub fn model_settings(&self, id: &str) -> Result<String> {
        let id = c_text("id", id)?;
        // SAFETY: the pool and the id live for the call.
        self.text(|pool, text, error| unsafe { ffi::omlx_model_settings(pool, id.as_ptr(), text, error) })
    }
}
