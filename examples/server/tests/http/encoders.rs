//! Embeddings and rerankings, by tiny random models.

use serde_json::{Value, json};

use crate::harness::{Server, root};

fn server() -> Server {
    let folder = root().join("tests/fixtures/encoders");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_omlx-server"));
    command.args(["serve", "--port", "0", "--device", "cpu", "--models"]).arg(folder);
    Server::spawn(command)
}

#[test]
fn vectors_come_as_numbers_and_as_base64() {
    let server = server();
    let body = |format: &str| json!({"model": "bert", "input": ["ab", "b a"], "encoding_format": format});
    let numbers = server.post("/v1/embeddings", &body("float")).expect(200);
    let vector = |answer: &Value, index: usize| answer["data"][index]["embedding"].clone();
    let first: Vec<f64> = serde_json::from_value(vector(&numbers, 0)).unwrap();
    assert_eq!(numbers["data"].as_array().unwrap().len(), 2);
    assert_ne!(vector(&numbers, 0), vector(&numbers, 1));
    assert!(numbers["usage"]["prompt_tokens"].as_u64().unwrap() > 0);
    let text = server.post("/v1/embeddings", &body("base64")).expect(200);
    let base64 = vector(&text, 0).as_str().unwrap().len();
    assert_eq!(base64, (first.len() * 4).div_ceil(3) * 4);
    let error = server.post("/v1/embeddings", &json!({"model": "bert", "input": 3})).expect(400);
    assert_eq!(error["error"]["type"], "invalid_request_error");
}

#[test]
fn documents_are_ordered_by_their_scores() {
    let server = server();
    let body = json!({"model": "bert-rerank", "query": "a", "documents": ["a b", "c", "b a c"], "top_n": 2,
        "return_documents": true});
    let answer = server.post("/v1/rerank", &body).expect(200);
    let results = answer["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    let score = |index: usize| results[index]["relevance_score"].as_f64().unwrap();
    assert!(score(0) >= score(1));
    let index = results[0]["index"].as_u64().unwrap() as usize;
    assert_eq!(results[0]["document"]["text"], body["documents"][index]);
    assert_eq!(server.post("/v1/rerank", &json!({"model": "bert-rerank", "query": "a"})).status, 400);
}
