"""Chat templates of the forms found in public models, written for our tests, and conversations to render with them."""

from typing import Any

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather at a <place> – now",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "días": {"type": "integer"}}},
        },
    }
]
DOCUMENTS = [{"title": "Cats", "text": "Cats purr. 🐱"}, {"title": "Dogs", "text": "Dogs bark.\n"}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"place": "Köln"}}}
SYSTEM = {"role": "system", "content": " Be kind. "}
USER = {"role": "user", "content": "Hi <b>ü</b> & 'you'\n"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [USER],
    "with a system message": [SYSTEM, USER, {"role": "assistant", "content": "Yes? \n"}, USER],
    "with thoughts": [USER, {"role": "assistant", "content": "So.", "reasoning_content": "Hm.\n"}, USER],
    "with a call": [
        SYSTEM,
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": '{"t": 7}'},
    ],
}

TEMPLATES = {
    "chatml": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "llama 3": """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" + system_message }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call at once") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
    {%- elif message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
    {%- endif %}
    {{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "mistral": """{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}
{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}{{- bos_token }}
{%- for message in loop_messages if message.role != "tool" %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}{{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}{%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}{{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}{{- "[/AVAILABLE_TOOLS]" }}{%- endif %}
        {%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\\n\\n" }}
        {%- else %}{{- "[INST] " }}{%- endif %}{{- message["content"] + "[/INST]" }}{%- set ns.index = ns.index + 1 %}
    {%- elif message.tool_calls is defined %}{%- for call in message.tool_calls %}
        {%- if call.id|length != 9 %}{{- raise_exception("ids have 9 characters") }}{%- endif %}
        {%- set out = call.function|tojson %}{{- out[:-1] }}{{- ', "id": "' + call.id + '"}' }}{%- endfor %}
        {{- eos_token }}
    {%- else %}{{- " " + message["content"]|trim + eos_token }}{%- endif %}
{%- endfor %}""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] | trim %}
{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{% for message in rest %}{% if message['role'] == 'tool' %}{% continue %}{% endif %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) and false %}{{ raise_exception('turns') }}{% endif %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + (first + '\\n' if loop.first and first else '') }}
{% if message['content'] is string %}{{ message['content'] | trim }}{% elif message['content'] is iterable %}
{% for item in message['content'] %}{{ item['text'] | trim if item['type'] == 'text' else '<image>' }}{% endfor %}
{% endif %}{{ '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    "qwen 3, thinking": """{%- if tools %}{{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' ~ tool_call.function.name ~ '", "arguments": ' }}
            {{- tool_call.function.arguments | tojson if tool_call.function.arguments is not string }}{{- '}' }}
        {%- endfor %}{{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    "deepseek r1": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}{%- for message in messages %}
{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}
{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}
{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] %}{% set content = message['content'] %}
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- if message['role'] == 'tool' %}
{%- set ns.is_tool = true -%}{{'<｜tool▁output｜>' + message['content']}}{%- endif %}{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}""",
    "phi": """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message
and message['tools'] is not none %}{{ '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|end|>' }}
{% else %}{{ '<|' + message['role'] + '|>' + (message['content'] or '') + '<|end|>' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}""",
    "glm": """[gMASK]<sop>{%- if tools -%}<|system|>
# Tools
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}{%- endif -%}
{%- macro visible_text(content) -%}{%- if content is string -%}{{- content }}
{%- elif content is iterable and content is not mapping -%}{%- for item in content -%}
{%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- endif -%}{%- endfor -%}
{%- else -%}{{- content }}{%- endif -%}{%- endmacro -%}
{%- for m in messages %}{%- if m.role == 'user' -%}<|user|>
{{ visible_text(m.content) }}{{- '/nothink' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- elif m.role == 'assistant' -%}<|assistant|>
{%- for tc in m.tool_calls or [] %}{%- if tc.function %}{%- set tc = tc.function %}{%- endif %}
{{ '\\n<tool_call>' + tc.name }}{% set _args = tc.arguments %}{% for k, v in _args.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}{% endfor %}{{ visible_text(m.content or '') }}
{%- elif m.role == 'tool' -%}<|observation|>{{ m.content }}
{%- elif m.role == 'system' -%}<|system|>
{{ visible_text(m.content) }}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}""",
    "hermes": """{%- macro json_to_python_type(json_spec) %}
{%- set basic_type_map = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} %}
{%- if basic_type_map[json_spec.type] is defined %}{{- basic_type_map[json_spec.type] }}
{%- elif json_spec.type == "array" %}{{- "list[" + json_to_python_type(json_spec|items) + "]" }}
{%- else %}{{- "Any" }}{%- endif %}{%- endmacro %}
{{- bos_token }}{{- '<|im_start|>system\\nTools: <tools> ' }}
{%- for tool in tools or [] %}{%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
{{- '{"type": "function", "function": ' }}{{- '{"name": "' + tool.name + '", ' }}
{{- '"description": "' + tool.name + '(' }}
{%- for name, spec in tool.parameters.properties|items %}
{{- name + ": " + json_to_python_type(spec) }}{%- if not loop.last %}{{- ", " }}{%- endif %}{%- endfor %}{{- ")" }}
{{- '", "parameters": ' }}{{- tool.parameters | tojson(separators=(',', ':'), sort_keys=true) }}{{- "}" }}{%- endfor %}
{{- " </tools><|im_end|>\\n" }}
{%- for message in messages %}{%- if message.tool_calls is defined %}{%- for tool_call in message.tool_calls %}
{{- '<tool_call>' }}{{- tool_call.function | tojson(True, 2) }}{{- '</tool_call>' }}{%- endfor %}
{%- elif message.role == "tool" and loop.previtem and loop.previtem.role != "tool" %}{{- '<|im_start|>tool\\n' }}
{{- message.content }}{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "smollm 3": """{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set reasoning_mode = "/think" if enable_thinking else "/no_think" -%}
{%- if messages[0].role == "system" -%}{%- set system_message = messages[0].content -%}
{%- if "/no_think" in system_message -%}{%- set reasoning_mode = "/no_think" -%}{%- endif -%}
{%- set custom_instructions = system_message.replace("/no_think", "").replace("/think", "").rstrip() -%}{%- endif -%}
{{- "<|im_start|>system\\n## Metadata\\n\\n" -}}{%- set today = strftime_now("%d %B %Y") -%}
{{- "Today Date: " ~ today ~ "\\nReasoning Mode: " + reasoning_mode + "\\n\\n" -}}
{%- if custom_instructions -%}{{- custom_instructions + "\\n\\n" -}}{%- endif -%}
{%- if xml_tools or tools -%}{%- set ns = namespace(xml_tool_string="<tools>\\n") -%}
{%- for tool in (xml_tools or tools)[:] -%}
{%- set ns.xml_tool_string = ns.xml_tool_string ~ (tool | string) ~ "\\n" -%}{%- endfor -%}
{{- ns.xml_tool_string + "</tools>\\n" -}}{%- endif -%}{{- "<|im_end|>\\n" -}}
{%- for message in messages -%}{%- set content = message.content if message.content is string else "" -%}
{%- if message.role == "user" -%}{{- "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" -}}
{%- elif message.role == "assistant" -%}{%- generation -%}
{{- "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" -}}{%- endgeneration -%}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}""",
    "command r": """{{ bos_token }}{% macro document_turn(documents) -%}<results>
{% for doc in documents %}Document: {{ loop.index0 }}
{% for key, value in doc | dictsort %}{{ key }}: {{ value | replace("\\n", " ") }}
{% endfor %}{% endfor %}</results>{%- endmacro %}
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system = 'Preamble.' %}{% endif %}
{{ '<|SYSTEM|>' ~ system | indent(2) }}
{% filter upper %}quoted {{ loop_messages | length }}{% endfilter %}
{% if documents %}{{ document_turn(documents) }}{% endif %}
{% for group in loop_messages | groupby('role') %}{{ group.grouper }}: {{ group.list | length }}; {% endfor %}
{% for message in loop_messages recursive %}{{ '<|' + message.role | upper + '|>' + (message.content or '') | trim }}
{% if message.tool_calls %}{{ message.tool_calls | map(attribute='function.name') | join(', ') }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|CHATBOT|>' }}{% endif %}{{ pad_token }}|{{ unk_token }}|{{ image_token }}""",
    "json": """{% for m in messages %}{{ m | tojson }}{{ m | tojson(ensure_ascii=True, indent=1) }}
{{ m | tojson(separators=(",", ":")) }}{{ dict(m, extra=[1.5, true, none]) | tojson(sort_keys=True) }}
{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}{{ tools | tojson }}
{{ (1, 'a') }}{{ {'b': 1.0} }}{{ dict.fromkeys(['k'], 1) }}""",
}
