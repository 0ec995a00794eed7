//! `omlx-server models`

use serde_json::Value;

use crate::app::open_pool;
use crate::options::Options;

/// Lists the models.
pub fn run(options: &Options) -> Result<(), String> {
    let pool = open_pool(options)?;
    let models = pool.models().map_err(|error| error.to_string())?;
    let models: Value = serde_json::from_str(&models).map_err(|error| error.to_string())?;
    for model in models.as_array().into_iter().flatten() {
        let text = |key: &str| model[key].as_str().unwrap_or("-").to_owned();
        let megabytes = model["file_bytes"].as_f64().unwrap_or_default() / 1e6;
        println!("{:<48} {:<10} {megabytes:>9.1} MB  {}", text("id"), text("kind"), text("problem"));
    }
    Ok(())
}
