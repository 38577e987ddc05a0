//! Finds the fields that a newer control plane added to a message. Generated types drop them without
//! a word, which gives a policy another meaning: a rule that denies by a new field alone would deny
//! nobody.

use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, Value};

static POLICY: LazyLock<MessageDescriptor> = LazyLock::new(|| {
    let pool = DescriptorPool::decode(ztunnel_api::DESCRIPTORS);
    let policy = pool.ok().and_then(|pool| pool.get_message_by_name("istio.security.Authorization"));
    policy.expect("the build script wrote the descriptors of the messages that it generated")
});

/// The first unknown field of an encoded policy, by the names of the fields around it and its own
/// number: `rules.clauses.matches.13`.
pub(super) fn in_policy(encoded: &[u8]) -> Result<Option<String>, prost::DecodeError> {
    DynamicMessage::decode(POLICY.clone(), encoded).map(|policy| in_message(&policy))
}

fn in_message(message: &DynamicMessage) -> Option<String> {
    if let Some(field) = message.unknown_fields().next() {
        return Some(field.number().to_string());
    }
    message
        .fields()
        .find_map(|(field, value)| in_value(value).map(|inner| format!("{}.{inner}", field.name())))
}

fn in_value(value: &Value) -> Option<String> {
    match value {
        Value::Message(message) => in_message(message),
        Value::List(values) => values.iter().find_map(in_value),
        Value::Map(values) => values.values().find_map(in_value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use ztunnel_api::security::{Authorization, Clause, Match, Rule, StringMatch, string_match::MatchType};

    use super::*;

    fn policy(matches: Vec<Match>) -> Authorization {
        let rules = vec![Rule { clauses: vec![Clause { matches }] }];
        Authorization {
            name: "p".to_owned(),
            namespace: "demo".to_owned(),
            rules,
            ..Authorization::default()
        }
    }

    /// Field `number` with two bytes.
    fn field(number: u8) -> [u8; 4] {
        [number << 3 | 2, 2, b'h', b'i']
    }

    #[test]
    fn what_the_definitions_know_is_known() {
        let presence = StringMatch { match_type: Some(MatchType::Presence(())) };
        let one = Match { principals: vec![presence], destination_ports: vec![1, 2], ..Match::default() };
        assert_eq!(in_policy(&policy(vec![one]).encode_to_vec()).unwrap(), None);
        // A default that is written out and unpacked numbers are the same message.
        assert_eq!(in_policy(&[0x18, 0]).unwrap(), None);
        let unpacked = [&[0x2a, 6, 0x0a, 4, 0x12, 2][..], &[0x48, 80]].concat();
        assert_eq!(in_policy(&unpacked).unwrap(), None);
    }

    #[test]
    fn an_unknown_field_is_found_wherever_it_is() {
        let top = [policy(vec![]).encode_to_vec(), field(7).to_vec()].concat();
        assert_eq!(in_policy(&top).unwrap().as_deref(), Some("7"));
        // rules { clauses { matches { 13: "hi" } } }
        let inner = [&[0x2a, 8, 0x0a, 6, 0x12, 4][..], &field(13)].concat();
        assert_eq!(in_policy(&inner).unwrap().as_deref(), Some("rules.clauses.matches.13"));
        // matches { principals { 5: "hi" } }
        let kind = [&[0x2a, 10, 0x0a, 8, 0x12, 6, 0x1a, 4][..], &field(5)].concat();
        assert_eq!(in_policy(&kind).unwrap().as_deref(), Some("rules.clauses.matches.principals.5"));
        in_policy(&[0x0a, 0xff]).unwrap_err();
    }
}
