//! `omlx-server pull ORG/NAME`

use std::io::Write;
use std::time::Duration;

use omlx_client::Status;
use serde_json::json;

use crate::app::open_pool;
use crate::options::Options;

/// Downloads a model and shows how far it is.
pub fn run(options: &Options) -> Result<(), String> {
    let [repo] = options.rest.as_slice() else { return Err("pull takes the name of one repository".to_owned()) };
    let pool = open_pool(options)?;
    let download = pool.download(&json!({"repo": repo}).to_string()).map_err(|error| error.to_string())?;
    let result = loop {
        match download.wait(Some(Duration::from_millis(500))) {
            Err(error) if error.status == Status::Timeout => {
                let progress = download.progress().map_err(|error| error.to_string())?;
                let (done, total) = (progress.bytes_done as f64 / 1e6, progress.bytes_total as f64 / 1e6);
                eprint!("\r{done:.1} of {total:.1} MB, {} of {} files ", progress.files_done, progress.files_total);
                let _ = std::io::stderr().flush();
            }
            other => break other,
        }
    };
    eprintln!();
    println!("{}", result.map_err(|error| error.to_string())?);
    Ok(())
}
