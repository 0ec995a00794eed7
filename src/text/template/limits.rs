//! Bounds on the values that a template builds.
//!
//! Values are dropped, printed and compared by recursion, so a template that nests a list a million times would
//! overflow the stack. What a loop can accumulate goes through an assignment; every assignment passes one of these
//! filters ([`super::source`] inserts them). What recursion of macros and loops adds is bounded by their own limit.

use minijinja::value::{Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::source::{BOUND_ATTRIBUTE_FILTER, BOUND_FILTER, ITERABLE_FILTER};

/// Deepest nesting of lists and maps in an assigned value; JSON from a request nests at most 128 deep.
pub(super) const MAX_DEPTH: usize = 256;

pub(super) fn add_to(env: &mut Environment<'_>) {
    env.add_filter(BOUND_FILTER, |state: &State, value: &Value| bounded(state, value, 0, true));
    env.add_filter(BOUND_ATTRIBUTE_FILTER, |state: &State, value: &Value| bounded(state, value, 0, false));
    env.add_filter(ITERABLE_FILTER, |value: &Value| match value.is_none() {
        true => Err(refused("none is not iterable")),
        false => Ok(value.clone()),
    });
}

/// `value` with its lazy parts (slices, `items()` and the like, which keep what they were made from) evaluated.
///
/// `engine_objects`: objects of the engine, such as namespaces, are allowed. They are not in an attribute of a
/// namespace, the one place that outlives a loop's iteration: they would hide depth and could refer to themselves.
fn bounded(state: &State, value: &Value, depth: usize, engine_objects: bool) -> Result<Value, Error> {
    let Some(object) = value.as_object() else { return Ok(value.clone()) };
    state.consume_fuel(1)?;
    let name = object.type_name();
    let is_map = value.kind() == ValueKind::Map;
    if name.ends_with("::Macro") {
        return Ok(value.clone());
    }
    if name.ends_with("::Namespace") || !(is_map || matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)) {
        return match engine_objects {
            true => Ok(value.clone()),
            false => Err(refused("a namespace can only hold plain values")),
        };
    }
    if depth >= MAX_DEPTH {
        return Err(refused("a value is nested too deeply"));
    }
    let nested = |item: &Value| bounded(state, item, depth + 1, engine_objects);
    if is_map {
        let mut pairs = Vec::new();
        for key in value.try_iter()? {
            let item = nested(&value.get_item(&key)?)?;
            pairs.push((key, item));
        }
        return Ok(Value::from_pairs(pairs));
    }
    let items = value.try_iter()?.checked().map(|item| nested(&item?)).collect::<Result<Vec<_>, Error>>()?;
    Ok(if value.is_tuple() { Value::from(Tuple::new(items)) } else { Value::from(items) })
}

fn refused(detail: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, detail)
}
