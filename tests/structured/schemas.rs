//! Random JSON schemas, and a validator for the keywords that they use, written from the specification alone.

use serde_json::{Map, Value, json};

/// A xorshift generator: the same seed gives the same schemas everywhere.
pub struct Random(u64);

impl Random {
    /// From any seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % end
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

const NAMES: [&str; 10] = ["name", "city", "age", "tags", "price", "in stock", "id", "größe", "a\"b", "next"];

/// A schema of an object whose values are bounded in length, so that even a model that repeats itself comes to an end.
pub fn random_schema(seed: u64) -> Value {
    let mut random = Random::new(seed);
    let mut schema = object(&mut random, 3);
    schema["$defs"] = json!({ "size": { "enum": ["small", "large"] }, "pair": { "type": "array",
        "items": { "$ref": "#/$defs/size" }, "minItems": 2, "maxItems": 2 } });
    schema
}

fn object(random: &mut Random, depth: usize) -> Value {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for _ in 0..1 + random.below(4) {
        let name = *random.pick(&NAMES);
        properties.insert(name.to_owned(), schema(random, depth - 1));
        if random.below(3) > 0 && !required.contains(&name) {
            required.push(name);
        }
    }
    json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": false })
}

fn schema(random: &mut Random, depth: usize) -> Value {
    match random.below(if depth == 0 { 8 } else { 12 }) {
        0 => json!({ "type": "string", "maxLength": 1 + random.below(12) }),
        1 => json!({ "type": "string", "minLength": 1 + random.below(3), "maxLength": 4 + random.below(8) }),
        2 => {
            let low = random.below(200) as i64 - 100;
            json!({ "type": "integer", "minimum": low, "maximum": low + random.below(1000) as i64 })
        }
        3 => json!({ "type": *random.pick(&["boolean", "null"]) }),
        4 => {
            let values = json!(["red", 7, true, null, "größer", "say \"x\"\n"]);
            json!({ "enum": &values.as_array().unwrap()[random.below(4)..] })
        }
        5 => json!({ "const": *random.pick(&["fixed", "a b", ""]) }),
        6 => json!({ "$ref": *random.pick(&["#/$defs/size", "#/$defs/pair"]) }),
        7 => json!({ "type": ["integer", "null"], "minimum": 0, "maximum": 9 }),
        8 | 9 => object(random, depth),
        10 => {
            let least = random.below(3);
            let items = schema(random, depth - 1);
            json!({ "type": "array", "items": items, "minItems": least, "maxItems": least + random.below(3) })
        }
        _ => json!({ "anyOf": [schema(random, depth - 1), { "type": "boolean" }] }),
    }
}

/// What of `value` does not satisfy `schema`, a part of `root`. Panics on a keyword that it does not know.
pub fn violation(root: &Value, schema: &Value, value: &Value) -> Option<String> {
    let keywords = schema.as_object().expect("a schema is an object");
    keywords.iter().find_map(|(keyword, argument)| {
        let fine = match keyword.as_str() {
            "type" => match argument {
                Value::Array(types) => types.iter().any(|name| has_type(name, value)),
                name => has_type(name, value),
            },
            "enum" => argument.as_array().unwrap().contains(value),
            "const" => argument == value,
            "minimum" => value.as_f64().is_none_or(|number| number >= argument.as_f64().unwrap()),
            "maximum" => value.as_f64().is_none_or(|number| number <= argument.as_f64().unwrap()),
            "minLength" => value.as_str().is_none_or(|text| text.chars().count() as u64 >= argument.as_u64().unwrap()),
            "maxLength" => value.as_str().is_none_or(|text| text.chars().count() as u64 <= argument.as_u64().unwrap()),
            "minItems" => value.as_array().is_none_or(|items| items.len() as u64 >= argument.as_u64().unwrap()),
            "maxItems" => value.as_array().is_none_or(|items| items.len() as u64 <= argument.as_u64().unwrap()),
            "items" => {
                return value.as_array()?.iter().find_map(|item| violation(root, argument, item));
            }
            "properties" => {
                let of = |(name, item)| argument.get(name).and_then(|schema| violation(root, schema, item));
                return value.as_object()?.iter().find_map(of);
            }
            "required" => {
                let has = |name: &Value| value.get(name.as_str().unwrap()).is_some();
                !value.is_object() || argument.as_array().unwrap().iter().all(has)
            }
            "additionalProperties" => {
                assert_eq!(argument, false);
                let known = |name: &String| schema["properties"].get(name).is_some();
                value.as_object().is_none_or(|object| object.keys().all(known))
            }
            "anyOf" => argument.as_array().unwrap().iter().any(|option| violation(root, option, value).is_none()),
            "$ref" => {
                let target = root.pointer(argument.as_str().unwrap().trim_start_matches('#')).expect("a definition");
                return violation(root, target, value);
            }
            "$defs" => true,
            other => panic!("{other:?} is not known"),
        };
        (!fine).then(|| format!("{value} does not satisfy {keyword:?}: {argument}"))
    })
}

fn has_type(name: &Value, value: &Value) -> bool {
    match name.as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => value.is_number(),
        other => panic!("{other:?} is no type"),
    }
}
