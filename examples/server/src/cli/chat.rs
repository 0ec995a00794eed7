//! `omlx-server chat [TEXT]`

use std::io::{BufRead, Write, stdin, stdout};

use omlx_client::{Event, Pool, RequestOptions};
use serde_json::{Map, Value, json};

use crate::app::open_pool;
use crate::options::Options;

/// Answers the text, or talks line by line.
pub fn run(options: &Options) -> Result<(), String> {
    let pool = open_pool(options)?;
    let mut messages = Vec::new();
    if !options.rest.is_empty() {
        messages.push(json!({"role": "user", "content": options.rest.join(" ")}));
        return answer(&pool, options, &messages).map(drop);
    }
    eprint!("> ");
    for line in stdin().lock().lines() {
        let line = line.map_err(|error| error.to_string())?;
        messages.push(json!({"role": "user", "content": line}));
        let text = answer(&pool, options, &messages)?;
        messages.push(json!({"role": "assistant", "content": text}));
        eprint!("> ");
    }
    Ok(())
}

fn answer(pool: &Pool, options: &Options, messages: &[Value]) -> Result<String, String> {
    let mut body = Map::new();
    body.insert("messages".to_owned(), messages.into());
    if let Some(model) = options.given("default-model") {
        body.insert("model".to_owned(), model.into());
    }
    let json = Value::Object(body).to_string();
    let request = pool.generate(&json, RequestOptions::default());
    let mut request = request.map_err(|error| error.to_string())?;
    let mut text = String::new();
    while let Some(event) = request.next_blocking(None).map_err(|error| error.to_string())? {
        match event {
            Event::Text(piece) => {
                print!("{}", piece.text);
                // A reader that went away shows at the next line.
                let _ = stdout().flush();
                text.push_str(&piece.text);
            }
            Event::Done(done) => {
                println!();
                if let Some(error) = done.error {
                    return Err(error.to_string());
                }
            }
            _ => {}
        }
    }
    Ok(text)
}
