//! Good values gone bad: of the right shape, most likely, and with something in them that is not.

use crate::Random;
use serde_json::Value;

/// Changes some of `value`: numbers to limits and neighbours, lists longer and shorter, parts of one place
/// to another. Most of what comes of it still decodes, so that what is behind the decoder has to refuse it.
pub fn change(random: &mut Random, value: &mut Value) {
    for _ in 0..=random.below(3) {
        let donor = part(random, value.clone());
        change_one(random, value, donor);
    }
}

/// Some part of it: every member of a list or a map has the same chance, however much is in it.
fn part(random: &mut Random, value: Value) -> Value {
    if random.chance(15) {
        return value;
    }
    match value {
        Value::Array(mut items) if !items.is_empty() => {
            let item = items.swap_remove(random.index(items.len()));
            part(random, item)
        }
        Value::Object(fields) if !fields.is_empty() => {
            let which = random.index(fields.len());
            let field = fields.into_iter().nth(which).expect("so many there are");
            part(random, field.1)
        }
        leaf => leaf,
    }
}

fn change_one(random: &mut Random, value: &mut Value, donor: Value) {
    if !value.is_object() && random.chance(4) {
        // Most likely of another shape.
        *value = if random.chance(30) { Value::Null } else { donor };
        return;
    }
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let which = random.index(fields.len());
            let field = fields.iter_mut().nth(which).expect("so many there are");
            change_one(random, field.1, donor);
        }
        Value::Array(items) => change_list(random, items, donor),
        Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => *value = near(random, number).into(),
            (None, Some(number)) => {
                *value = near(random, number.cast_unsigned()).cast_signed().into()
            }
            (None, None) => *value = donor,
        },
        Value::Bool(yes) if random.chance(80) => *yes = !*yes,
        Value::String(text) if random.chance(50) => match random.below(3) {
            0 => text.clear(),
            1 => text.push_str("\u{1b}[2J"),
            _ => *text = text.repeat(1 + random.index(40)),
        },
        Value::Null if random.chance(50) => *value = near(random, 0).into(),
        // Of another place, and perhaps of another shape: what it is depends on what it is put into.
        _ => *value = donor,
    }
}

fn change_list(random: &mut Random, items: &mut Vec<Value>, donor: Value) {
    let len = items.len();
    match random.below(8) {
        0 if len > 0 => drop(items.remove(random.index(len))),
        1 if len > 0 => {
            let again = random.pick(items).clone();
            items.insert(random.index(len + 1), again);
        }
        2 if len > 1 => items.swap(random.index(len), random.index(len)),
        3 => items.truncate(random.index(len + 1)),
        4 if len > 0 && random.chance(30) => {
            let again = items.clone();
            (0..random.index(6)).for_each(|_| items.extend_from_slice(&again));
        }
        5 if random.chance(30) => items.push(donor),
        _ if len > 0 => {
            let which = random.index(len);
            change_one(random, &mut items[which], donor);
        }
        _ => items.push(donor),
    }
}

/// A number that has something to do with `number`, or with the limits of integers.
fn near(random: &mut Random, number: u64) -> u64 {
    match random.below(8) {
        0 => number ^ 1 << random.below(64),
        // The widths that registers have.
        1 => number ^ 1 << random.below(8),
        2 => number ^ 1 << random.below(16),
        3 => number.wrapping_add(random.between(1, 3)),
        4 => number.wrapping_sub(random.between(1, 3)),
        5 => u64::MAX >> random.below(64),
        6 => 1 << random.below(64),
        _ => {
            let bits = random.between(1, 20);
            random.below(1 << bits)
        }
    }
}
