import OMLX

let pool = try await EnginePool()
let session = ChatSession(pool.model("tiny-chat"), instructions: "Remember these facts:\nTom has a cat called Luna.")
for try await text in session.streamResponse(to: "What is the name of Tom's cat?") {
    print(text, terminator: "")
}
struct Person: Decodable { let name: String, age: Int }
let person = try await ChatSession(pool.model("tiny-chat")).respond(
    to: "Extract name, age as JSON:\nName: Mia\nAge: 34", as: Person.self,
    schema: .object(["name": .string, "age": .integer]))
print("\n\(person.content.name) is \(person.content.age).")
try await pool.close()
