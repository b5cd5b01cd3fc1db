-- The sessions whose deadline has passed, with the state that says what somebody must do about them.
-- KEYS  1 deadlines zset, 2 tick hash
-- ARGV  1 most to look at, 2 lease in ms, 3 prefix of session keys (same slot), 4 most callbacks to give
-- gives {id, state, id, state, …}
-- Atomic: the tick tells whether anybody has been looking. After a silence of over two seconds (Redis was away, or every
-- worker) no running session is given for one lease, since healthy owners must be able to renew first.
local now = now_ms()
local tick = redis.call('HMGET', KEYS[2], 'at', 'calm_until')
local calm_until = tonumber(tick[2]) or 0
if now - (tonumber(tick[1]) or 0) > 2000 then
  calm_until = now + ARGV[2]
end
redis.call('HSET', KEYS[2], 'at', now, 'calm_until', calm_until)
redis.call('EXPIRE', KEYS[2], 86400)
local due = {}
local callbacks = tonumber(ARGV[4])
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local state = redis.call('HGET', ARGV[3] .. id, 'state')
  if not state then
    redis.call('ZREM', KEYS[1], id)
  elseif ENDED[state] and callbacks > 0 or state == 'pending' or state == 'running' and now >= calm_until then
    due[#due + 1] = id
    due[#due + 1] = state
    if ENDED[state] then
      callbacks = callbacks - 1
    end
  end
end
return due
