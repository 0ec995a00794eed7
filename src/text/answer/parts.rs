//! The parts of an answer as they come out of a parser.

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AnswerPart {
    /// Text for the user.
    Content(String),
    /// Text that the model thinks by.
    Reasoning(String),
    /// A piece of a tool call.
    Call {
        /// Which call of the answer, from 0.
        index: usize,
        /// The call's id; the same in all its pieces.
        id: String,
        /// Name of the tool; the same in all its pieces.
        name: String,
        /// The next piece of the arguments, JSON text; empty in the first piece.
        arguments: String,
    },
}

/// Parts in the order of the text, neighbours of one kind joined.
#[derive(Debug, Default)]
pub(super) struct Parts {
    list: Vec<AnswerPart>,
    /// Index, id and name of the last call.
    call: (usize, String, String),
}

impl Parts {
    pub fn content(&mut self, text: &str) {
        match self.list.last_mut() {
            _ if text.is_empty() => {}
            Some(AnswerPart::Content(last)) => last.push_str(text),
            _ => self.list.push(AnswerPart::Content(text.to_owned())),
        }
    }

    pub fn reasoning(&mut self, text: &str) {
        match self.list.last_mut() {
            _ if text.is_empty() => {}
            Some(AnswerPart::Reasoning(last)) => last.push_str(text),
            _ => self.list.push(AnswerPart::Reasoning(text.to_owned())),
        }
    }

    /// A call begins.
    pub fn call(&mut self, index: usize, id: String, name: String) {
        self.call = (index, id, name);
        self.push_call(String::new());
    }

    /// A piece of the last call.
    pub fn arguments(&mut self, piece: &str) {
        match self.list.last_mut() {
            Some(AnswerPart::Call { index, arguments, .. }) if *index == self.call.0 => arguments.push_str(piece),
            _ => self.push_call(piece.to_owned()),
        }
    }

    fn push_call(&mut self, arguments: String) {
        let (index, id, name) = self.call.clone();
        self.list.push(AnswerPart::Call { index, id, name, arguments });
    }

    /// What has come since the last call of this.
    pub fn take(&mut self) -> Vec<AnswerPart> {
        std::mem::take(&mut self.list)
    }
}
