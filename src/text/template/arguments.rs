//! Arguments of earlier tool calls: text in requests, objects in most templates.

use serde_json::Value;

/// Whether templates with this source take the arguments of calls as objects only. Those that look what they got, or join
/// them to other text, take text, which keeps the very words of the model.
pub(super) fn take_objects(source: &str) -> bool {
    const TEXT: [&str; 2] = ["arguments", "arguments']"];
    const AFTER: [&str; 5] = ["isstring", "isnotstring", "ismapping", "isnotmapping", "+"];
    let source: String = source.chars().filter(|c| !c.is_whitespace()).collect();
    let source = source.replace('"', "'");
    let uses = |name: &str| source.match_indices(name).map(|(at, _)| at + name.len()).collect::<Vec<_>>();
    let takes_text = |end: usize| AFTER.iter().any(|after| source[end..].starts_with(after));
    source.contains("arguments") && !TEXT.iter().flat_map(|name| uses(name)).any(takes_text)
}

/// `messages` with the text of arguments read; `None` if there was none that is an object.
pub(super) fn objects(messages: &Value) -> Option<Value> {
    let mut messages = messages.clone();
    let mut changed = false;
    let list = messages.as_array_mut()?;
    let calls = list.iter_mut().filter_map(|message| message.get_mut("tool_calls")?.as_array_mut()).flatten();
    for call in calls {
        let function = if call.get("function").is_some() { call.get_mut("function") } else { Some(call) };
        let Some(arguments) = function.and_then(|function| function.get_mut("arguments")) else { continue };
        let object = arguments.as_str().map(|text| if text.trim().is_empty() { "{}" } else { text });
        if let Some(object) = object.and_then(|text| serde_json::from_str(text).ok()).filter(Value::is_object) {
            *arguments = object;
            changed = true;
        }
    }
    changed.then_some(messages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn templates_that_take_text_are_told_from_others() {
        for source in [
            "{{ call.arguments if call.arguments is string else call.arguments | tojson }}",
            "{% if call['arguments'] is not string %}",
            "{{ '```json' + tool['function']['arguments'] + '```' }}",
            "{% if args.arguments is mapping %}",
            "no calls",
        ] {
            assert!(!take_objects(source), "{source}");
        }
        for source in [
            "{{ tool_call.arguments | tojson }}",
            "{% for k, v in call.arguments | items %}",
            "{% set a = tc.arguments %}",
        ] {
            assert!(take_objects(source), "{source}");
        }
    }

    #[test]
    fn text_becomes_objects_where_it_is_one() {
        let call = |arguments: Value| json!({"type": "function", "function": {"name": "f", "arguments": arguments}});
        let messages =
            |calls: Value| json!([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}]);
        let given =
            messages(json!([call(json!("{\"b\": 1, \"a\": [\"x\"]}")), call(json!("not JSON")), call(json!(""))]));
        let expected = messages(json!([call(json!({"b": 1, "a": ["x"]})), call(json!("not JSON")), call(json!({}))]));
        assert_eq!(objects(&given), Some(expected));
        assert_eq!(objects(&messages(json!([call(json!({"a": 1})), call(json!("[1]"))]))), None);
        assert_eq!(
            objects(&json!([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}, 7]}, 8])).unwrap()
                [0]["tool_calls"][0]["arguments"],
            json!({})
        );
        assert_eq!(objects(&json!("no messages")), None);
    }
}
