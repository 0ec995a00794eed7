//! `strftime_now`: the local time in Python's notation.

use jiff::civil::DateTime;

/// A local date and time, what Python calls naive: without a zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalTime {
    /// Year, 1 to 9999.
    pub year: i16,
    /// Month, 1 to 12.
    pub month: i8,
    /// Day of the month, 1 to 31.
    pub day: i8,
    /// Hour, 0 to 23.
    pub hour: i8,
    /// Minute, 0 to 59.
    pub minute: i8,
    /// Second, 0 to 59.
    pub second: i8,
}

impl LocalTime {
    /// The present time in the system's zone (UTC where it has none).
    pub fn now() -> Self {
        let now = jiff::Zoned::now();
        Self {
            year: now.year(),
            month: now.month(),
            day: now.day(),
            hour: now.hour(),
            minute: now.minute(),
            second: now.second(),
        }
    }

    /// Python's `datetime.strftime` in the C locale. A directive that is not known stays as it is, the zone's are
    /// empty.
    pub(super) fn format(self, format: &str) -> Result<String, String> {
        let time = DateTime::new(self.year, self.month, self.day, self.hour, self.minute, self.second, 0)
            .map_err(|e| e.to_string())?;
        let mut out = String::new();
        let mut rest = format;
        while let Some(at) = rest.find('%') {
            out.push_str(&rest[..at]);
            rest = &rest[at..];
            let flags = rest[1..].bytes().take_while(|b| b"-_0^#".contains(b)).count();
            let Some(directive) = rest[1 + flags..].chars().next() else { break };
            let end = 1 + flags + directive.len_utf8();
            let (known, form) = match directive {
                'c' => (true, "%a %b %e %H:%M:%S %Y"),
                'x' => (true, "%m/%d/%y"),
                'X' => (true, "%H:%M:%S"),
                'r' => (true, "%I:%M:%S %p"),
                'f' => (true, "000000"),
                'z' | 'Z' => (true, ""),
                _ => ("aAbBCdDeFgGhHIjklmMnpPRStTuUVwWyY%".contains(directive), &rest[..end]),
            };
            match known {
                true => out.push_str(&jiff::fmt::strtime::format(form, time).map_err(|e| e.to_string())?),
                false => out.push_str(form),
            }
            rest = &rest[end..];
        }
        out.push_str(rest);
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_directives() {
        let time = LocalTime { year: 2024, month: 7, day: 4, hour: 15, minute: 5, second: 9 };
        // From CPython 3.11: datetime(2024, 7, 4, 15, 5, 9).strftime(..).
        for (format, expected) in [
            ("%d %b %Y", "04 Jul 2024"),
            ("%Y-%m-%d", "2024-07-04"),
            ("%B %d, %Y", "July 04, 2024"),
            ("%-d %-m %e|%_d", "4 7  4| 4"),
            ("%A %a %w %u %j %U %W %V %G %g", "Thursday Thu 4 4 186 26 27 27 2024 24"),
            ("%H:%M:%S %I %p %P %k %l", "15:05:09 03 PM pm 15  3"),
            (
                "%c|%x|%X|%r|%D|%F|%T|%R",
                "Thu Jul  4 15:05:09 2024|07/04/24|15:05:09|03:05:09 PM|07/04/24|2024-07-04|15:05:09|15:05",
            ),
            ("%f %z%Z %y %C %h %% %^a", "000000  24 20 Jul % THU"),
            ("100%", "100%"),
            ("é%Yé", "é2024é"),
        ] {
            assert_eq!(time.format(format).unwrap(), expected, "{format}");
        }
        let invalid = LocalTime { month: 13, ..time };
        assert!(invalid.format("%Y").is_err());
    }
}
