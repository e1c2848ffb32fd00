//! The little of ACPI's machine language (ACPI 6.4, §20) that names a bus, its interrupts and a sleep state.

/// Elements of a package that `pkg_length` and byte-sized counts are good for.
const MAX_ELEMENTS: usize = 255;

/// `PkgLength` of what comes behind it, itself included.
fn pkg_length(behind: usize) -> Vec<u8> {
    match behind {
        0..=0x3E => vec![behind as u8 + 1],
        _ => {
            let length = behind + 2;
            assert!(length < 1 << 12, "two bytes of length");
            vec![0x40 | (length & 0xF) as u8, (length >> 4) as u8]
        }
    }
}

/// An operator with a length, and what it holds.
fn with_length(operator: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    [operator, &pkg_length(content.len()), &content].concat()
}

/// An integer, in the shortest of the forms used here.
pub(super) fn integer(value: u32) -> Vec<u8> {
    match value {
        0 => vec![0x00],
        1..=0xFF => vec![0x0A, value as u8],
        _ => [&[0x0C][..], &value.to_le_bytes()].concat(),
    }
}

/// `Package () { … }`
pub(super) fn package(elements: &[Vec<u8>]) -> Vec<u8> {
    assert!(elements.len() <= MAX_ELEMENTS, "a count in a byte");
    with_length(&[0x12], &[&[elements.len() as u8], &elements.concat()])
}

/// `Buffer () { … }`
pub(super) fn buffer(bytes: &[u8]) -> Vec<u8> {
    let size = integer(u32::try_from(bytes.len()).expect("a small buffer"));
    with_length(&[0x11], &[&size, bytes])
}

/// `Name (name, value)`
pub(super) fn name(name: &[u8; 4], value: &[u8]) -> Vec<u8> {
    [&[0x08][..], name, value].concat()
}

/// `Scope (\name) { … }`
pub(super) fn scope(name: &[u8; 4], content: &[u8]) -> Vec<u8> {
    with_length(&[0x10], &[b"\\", name, content])
}

/// `Device (name) { … }`
pub(super) fn device(name: &[u8; 4], content: &[u8]) -> Vec<u8> {
    with_length(&[0x5B, 0x82], &[name, content])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_packages_have_the_lengths_that_the_language_wants() {
        let two = package(&[integer(5), integer(0)]);
        assert_eq!(two, [0x12, 0x05, 2, 0x0A, 5, 0x00]);
        let many = package(&vec![integer(0x1_FFFF); 20]);
        // 20 integers of five bytes, the count, and two bytes of length: 103.
        assert_eq!(many[..4], [0x12, 0x47, 0x06, 20]);
        assert_eq!(many.len(), 1 + 103);
        assert_eq!(pkg_length(0x3E), [0x3F]);
        assert_eq!(pkg_length(0x3F), [0x41, 0x04]);
    }

    #[test]
    fn names_and_devices_nest() {
        let device = device(b"PCI0", &name(b"_UID", &integer(0)));
        assert_eq!(scope(b"_SB_", &device)[..9], *b"\x10\x13\\_SB_\x5B\x82");
        assert_eq!(buffer(&[0x79, 0]), [0x11, 0x05, 0x0A, 2, 0x79, 0]);
    }
}
